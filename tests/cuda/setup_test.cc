// What a plan of the cuda backend settles, for devices that need not be there; backward_setup_test.cc: what of it is
// about backward.
#include "cuda/backend.h"
#include "planned.h"

namespace moba::test {
namespace {

using cuda::AttendKernel;
using cuda::BackwardKernel;
using cuda::DeviceLimits;
using cuda::GateKernel;

TEST(CudaSetup, KernelsFollowTheDeviceAndTheProblem) {
  struct Row {
    DeviceLimits device;
    std::string family;
    std::int64_t head_dim, block_size, top_k;
    bool causal;
    GateKernel gate;
    AttendKernel attend, dense;
  };
  constexpr auto kResident = AttendKernel::resident_sm90, kStream = AttendKernel::stream_sm90,
                 kPortable = AttendKernel::portable;
  const std::vector<Row> rows{
      {kH200, "", 128, 128, 8, true, GateKernel::sm90, kResident, kStream},
      {kH200, "sm90", 64, 16, 8, true, GateKernel::sm90, kResident, kStream},
      {kH200, "", 128, 144, 8, true, GateKernel::sm90, kStream, kStream},
      {kH200, "", 64, 8192, 2, false, GateKernel::sm90, kStream, kStream},
      {kH200, "", 128, 128, 17, true, GateKernel::sm90, kResident, kStream},
      {kH200, "", 128, 128, 18, true, GateKernel::portable, kResident, kStream},
      {kH200, "", 128, 128, 16, false, GateKernel::sm90, kResident, kStream},
      {kH200, "", 128, 128, 17, false, GateKernel::portable, kResident, kStream},
      {kH200, "", 96, 128, 8, true, GateKernel::portable, kPortable, kPortable},
      {kH200, "", 256, 128, 8, true, GateKernel::portable, kPortable, kPortable},
      {kH200, "portable", 128, 128, 8, true, GateKernel::portable, kPortable, kPortable},
      {kA100, "", 128, 128, 8, true, GateKernel::portable, kPortable, kPortable},
      {kA100, "portable", 64, 128, 8, true, GateKernel::portable, kPortable, kPortable},
      {kB200, "", 128, 128, 8, true, GateKernel::portable, kPortable, kPortable},
      {kRtx, "", 128, 128, 8, true, GateKernel::portable, kPortable, kPortable},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(::testing::Message() << "row " << &row - rows.data());
    const Config config{.block_size = row.block_size, .top_k = row.top_k, .causal = row.causal};
    const Plan::Impl plan = planned(problem_of(50000, 8, 2, row.head_dim, config), row.device, row.family);
    EXPECT_EQ(plan.cuda->gate, row.gate);
    EXPECT_EQ(plan.cuda->attend, row.attend);
    EXPECT_EQ(plan.cuda->dense, row.dense);
    EXPECT_EQ(plan.cuda->backward, row.dense == kStream ? BackwardKernel::sm90 : BackwardKernel::portable);
    EXPECT_NE(cuda::describe_kernels(plan).find(row.device.name), std::string::npos) << cuda::describe_kernels(plan);
    EXPECT_EQ(plan.cuda->rows_per_unit % 64, 0);
    EXPECT_EQ(plan.cuda->shape.sm_count, row.device.sm_count);
  }
}

TEST(CudaSetup, DescribesItsKernelsAndHowItCutsTheWork) {
  const Problem problem = problem_of(1 << 16, 16, 2, 128, {.block_size = 512, .top_k = 8});
  EXPECT_EQ(cuda::describe_kernels(planned(good_problem(), kH200)),
            "cuda (NVIDIA H200): gate sm90, attend resident sm90, 1 slab; backward sm90, 1 slab");
  EXPECT_EQ(cuda::describe_kernels(planned(problem, kA100, "", 1024 * kMiB)),
            "cuda (NVIDIA A100): gate portable, attend portable, 4 slabs; backward portable, 4 slabs of 8 passes");
  EXPECT_EQ(cuda::describe_kernels(planned(problem, kH200, "", granted(problem, kH200, 1))),
            "cuda (NVIDIA H200): gate sm90, attend stream sm90, 1024 slabs; "
            "backward refused: the workspace limit is too low");
  Problem dense = good_problem();
  dense.config.top_k = 32;
  EXPECT_EQ(cuda::describe_kernels(planned(dense, kH200)),
            "cuda (NVIDIA H200): stream sm90, every block chosen: full attention; backward sm90, 1 slab");
}

TEST(CudaSetup, WorkspacesStayWithinTheirLimit) {
  const std::vector<Problem> problems{
      good_problem(),
      problem_of(1 << 20, 16, 16, 128, {.block_size = 128, .top_k = 8}),
      problem_of(1 << 20, 16, 2, 128, {.block_size = 512, .top_k = 12}),
      problem_of(10'000'000, 1, 1, 128, {.block_size = 4096, .top_k = 12}),
      problem_of(1 << 17, 64, 8, 256, {.block_size = 16, .top_k = 64}),
  };
  for (const Problem& problem : problems) {
    for (const DeviceLimits& device : {kH200, kA100}) {
      const Plan::Impl unlimited = planned(problem, device);
      EXPECT_LE(workspace_of(unlimited), (2048 + 1) * kMiB + unlimited.centroids_bytes);
      const bool long_keys = key_sums(problem) > 1500 * kMiB;
      EXPECT_LE(backward_workspace_of(unlimited), (2048 + 1) * kMiB + (long_keys ? key_sums(problem) : 0));
      for (const std::size_t asked : {1024 * kMiB, 3000 * kMiB, 8192 * kMiB, 100'000 * kMiB}) {
        const std::size_t limit = granted(problem, device, asked);
        EXPECT_TRUE(limit == asked || asked < key_sums(problem) + 1024 * kMiB) << asked << ", granted " << limit;
        const Plan::Impl plan = planned(problem, device, "", limit);
        SCOPED_TRACE(::testing::Message()
                     << problem.total_q << " tokens, limit " << limit << ": " << cuda::describe_kernels(plan));
        EXPECT_LE(workspace_of(plan), limit);
        EXPECT_TRUE(backward_workspace_of(plan) <= limit || plan.backward_workspace_limit > limit);
        EXPECT_GE(plan.cuda->slab_heads, 1);
        EXPECT_LE(plan.cuda->slab_heads, problem.kv_heads);
        EXPECT_GE(plan.cuda->slab_tokens, 1);
        EXPECT_TRUE(plan.cuda->slab_tokens == problem.total_q || plan.cuda->slab_heads == 1);
      }
    }
  }
}

// What index() takes grows with tokens * blocks; a plan that is short of it serves all else.
TEST(CudaSetup, HugeIndexesAreLeftOut) {
  const std::vector<Problem> problems{
      problem_of(1 << 20, 64, 1, 128, {.block_size = 64, .top_k = 8}),
      problem_of(10'000'000, 1, 1, 64, {.block_size = 16, .top_k = 8}),
      problem_of(16 << 20, 1, 1, 64, {.block_size = 128, .top_k = 8}),
  };
  for (const Problem& problem : problems) {
    const Plan::Impl plan = planned(problem, kH200);
    EXPECT_LE(workspace_of(plan), (2048 + 1) * kMiB + plan.centroids_bytes);
    ASSERT_GT(plan.index_workspace_limit, 2048 * kMiB);
    EXPECT_EQ(plan.cuda->index_heads, 0);
    const std::size_t limit = granted(problem, kH200, 1024 * kMiB + plan.centroids_bytes);
    EXPECT_LE(workspace_of(planned(problem, kH200, "", limit)), limit);
    const Plan::Impl large = planned(problem, kH200, "", plan.index_workspace_limit);
    EXPECT_EQ(large.index_workspace_limit, 0u);
    EXPECT_GE(large.cuda->index_heads, 1);
    EXPECT_LE(workspace_of(large), plan.index_workspace_limit);
  }
}

TEST(CudaSetup, KnowsWhatItWasBuiltFor) {
  const std::string all = "80-real 90-real 100 120";
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 6}, {8, 9}, {9, 0}, {10, 0}, {10, 3}, {11, 0}, {12, 1}}) {
    EXPECT_TRUE(cuda::is_built_for(major, minor, all)) << major << "." << minor;
  }
  EXPECT_FALSE(cuda::is_built_for(9, 0, "80-real"));
  EXPECT_FALSE(cuda::is_built_for(8, 0, "86-real 90-real"));
  EXPECT_TRUE(cuda::is_built_for(8, 9, "86-real"));
  EXPECT_FALSE(cuda::is_built_for(8, 0, "90-virtual"));
  EXPECT_TRUE(cuda::is_built_for(10, 0, "90-virtual"));
  EXPECT_TRUE(cuda::is_built_for(8, 6, "native"));
}

// Rope's rotated copies are beyond the default limit, not within it.
TEST(CudaSetup, RopeNeedsNoLimit) {
  Problem p = problem_of(1 << 20, 64, 8, 128, {.block_size = 128, .top_k = 8});
  p.rope = Rope{};
  const Plan::Impl plan = planned(p, kH200);
  EXPECT_GT(workspace_of(plan), std::size_t{1 << 20} * 72 * 256);
  EXPECT_LE(workspace_of(plan), std::size_t{1 << 20} * 72 * 256 + plan.centroids_bytes + 2049 * kMiB);
  EXPECT_GT(backward_workspace_of(plan), std::size_t{1 << 20} * 72 * 256);
  EXPECT_LE(backward_workspace_of(plan), std::size_t{1 << 20} * 72 * 256 + 2049 * kMiB);
}

// Some tokens of a key head, the units of dense() and, where that is not much, the counts of index().
TEST(CudaSetup, SmallLimitsAreKeptOrRefused) {
  for (const std::int64_t kv_heads : {1, 2, 16}) {
    const Problem problem = problem_of(1 << 20, 16, kv_heads, 128, {.block_size = 128, .top_k = 8});
    const std::size_t least = granted(problem, kH200, kMiB);
    EXPECT_GT(least, kMiB);
    for (const std::size_t limit : {least, least + 1, least + kMiB, 2 * least}) {
      const Plan::Impl plan = planned(problem, kH200, "", limit);
      EXPECT_LE(workspace_of(plan), limit);
    }
  }
}

TEST(CudaSetup, RefusesWhatTheKernelsDoNotServe) {
  EXPECT_EQ(message_of(good_problem()), "accepted");
  struct Row {
    std::string argument, allowed;
    void (*change)(Problem&);
  };
  const std::vector<Row> rows{
      {"dtype: is f32", "f16, bf16", [](Problem& p) { p.dtype = DType::f32; }},
      {"head_dim: is 80", "32, 64, 96, 128, 192, 256", [](Problem& p) { p.head_dim = 80; }},
      {"head_dim: is 8", "32, 64, 96, 128, 192, 256", [](Problem& p) { p.head_dim = 8; }},
      {"config.block_size: is 24", "multiples of 16 up to 8192", [](Problem& p) { p.config.block_size = 24; }},
      {"config.block_size: is 1", "multiples of 16 up to 8192", [](Problem& p) { p.config.block_size = 1; }},
      {"config.block_size: is 8208", "multiples of 16 up to 8192", [](Problem& p) { p.config.block_size = 8208; }},
      {"config.top_k: is 65", "up to 64", [](Problem& p) { p.config.top_k = 65, p.config.block_size = 16; }},
      {"q_heads: is 70000", "up to 65535", [](Problem& p) { p.kv_heads = p.q_heads = 70000; }},
      {"config.block_size: is 16", "blocks up to 2^21",
       [](Problem& p) { p.config.block_size = 16, p.total_k = 1 << 26; }},
      {"config.scale: is -0.5", "0 or more", [](Problem& p) { p.config.scale = -0.5; }},
      {"total_q: is 300000000", "up to 2^31 - 2^16", [](Problem& p) { p.total_q = 300'000'000, p.q_heads = 2; }},
  };
  for (const Row& row : rows) {
    Problem p = good_problem();
    row.change(p);
    const std::string message = message_of(p);
    EXPECT_NE(message.find(row.argument), std::string::npos) << message;
    EXPECT_NE(message.find("allowed: "), std::string::npos) << message;
    EXPECT_NE(message.find(row.allowed), std::string::npos) << message;
    EXPECT_NE(message.find("on cuda; the cpu backend takes others"), std::string::npos) << message;
  }
  Problem p = good_problem();  // as many slots as there are blocks
  p.config.top_k = 1000;
  EXPECT_EQ(message_of(p), "accepted");
  p.config.scale = 0.0;
  EXPECT_EQ(message_of(p), "accepted");
}

TEST(CudaSetup, RefusesOptions) {
  EXPECT_NE(
      message_of(good_problem(), kH200, "hopper").find("options.cuda_kernels: is 'hopper'; allowed: sm90, portable"),
      std::string::npos);
  for (const DeviceLimits& device : {kA100, kB200, kRtx}) {
    const std::string message = message_of(good_problem(), device, "sm90");
    EXPECT_NE(message.find("options.cuda_kernels: is sm90; allowed: portable on " + device.name), std::string::npos)
        << message;
  }
  Problem p = good_problem();
  p.head_dim = 96;
  EXPECT_NE(message_of(p, kH200, "sm90").find("where head_dim is not 64 or 128"), std::string::npos);

  const std::string message = message_of(good_problem(), kH200, "", 1000), mark = "at least ";
  EXPECT_NE(message.find("options.workspace_limit: is 1000 bytes"), std::string::npos) << message;
  ASSERT_NE(message.find(mark), std::string::npos) << message;
  const std::size_t least = std::stoull(message.substr(message.find(mark) + mark.size()));
  EXPECT_EQ(message_of(good_problem(), kH200, "", least), "accepted");
  EXPECT_NE(message_of(good_problem(), kH200, "", least - 1), "accepted");
}

}  // namespace
}  // namespace moba::test
