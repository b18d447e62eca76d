// What a plan of the cuda backend settles, for devices that need not be there.
#include "cuda/setup.h"

#include <algorithm>

#include "cuda/backend.h"
#include "support.h"

namespace moba::test {
namespace {

using cuda::AttendKernel;
using cuda::BackwardKernel;
using cuda::DeviceLimits;
using cuda::GateKernel;

constexpr std::size_t kMiB = std::size_t{1} << 20;

const DeviceLimits kH200{0, "NVIDIA H200", 9, 0, 132, 141'000 * kMiB};
const DeviceLimits kA100{0, "NVIDIA A100", 8, 0, 108, 80'000 * kMiB};
const DeviceLimits kB200{0, "NVIDIA B200", 10, 0, 148, 180'000 * kMiB};
const DeviceLimits kRtx{0, "NVIDIA RTX PRO 6000", 12, 0, 188, 96'000 * kMiB};

Problem problem_of(std::int64_t tokens, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t head_dim,
                   const Config& config) {
  Problem p;
  p.dtype = DType::bf16;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.total_q = p.total_k = tokens;
  p.config = config;
  return p;
}

Problem good_problem() { return problem_of(4096, 8, 2, 128, {.block_size = 128, .top_k = 8}); }

// A plan as Plan makes it, on a device that need not be there.
Plan::Impl planned(const Problem& problem, const DeviceLimits& device, const std::string& family = "",
                   std::size_t limit = 0) {
  Plan::Impl plan = Plan(problem, {.threads = 1}).impl();
  plan.options = {};
  plan.options.backend = Backend::cuda;
  plan.options.cuda_kernels = family;
  plan.options.workspace_limit = limit;
  cuda::prepare(plan, device);
  return plan;
}

std::size_t workspace_of(const Plan::Impl& plan) {
  return kAlignment + aligned(plan.scratch_bytes) + plan.q_rotated_bytes + plan.k_rotated_bytes + plan.centroids_bytes +
         plan.selection_bytes;
}

std::size_t backward_workspace_of(const Plan::Impl& plan) {
  return kAlignment + aligned(plan.backward_scratch_bytes) + plan.q_rotated_bytes + plan.k_rotated_bytes;
}

std::string message_of(const Problem& problem, const DeviceLimits& device = kH200, const std::string& family = "",
                       std::size_t limit = 0) {
  try {
    planned(problem, device, family, limit);
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

// The limit, or the one that its refusal asks for.
std::size_t granted(const Problem& problem, const DeviceLimits& device, std::size_t limit) {
  const std::string message = message_of(problem, device, "", limit), mark = "at least ";
  if (message == "accepted") return limit;
  EXPECT_NE(message.find("options.workspace_limit: is "), std::string::npos) << message;
  const std::size_t at = message.find(mark);
  return at == std::string::npos ? 0 : std::stoull(message.substr(at + mark.size()));
}

// What no plan of backward may be able to do without: dk and dv of a key head, in float32.
std::size_t key_sums(const Problem& problem) {
  return static_cast<std::size_t>(problem.total_k * problem.head_dim) * 2 * sizeof(float);
}

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

// The portable kernel holds as many keys as it has room for, and no more than a short block has.
TEST(CudaSetup, PartsFollowTheKernelAndTheBlocks) {
  struct Row {
    std::string family;
    std::int64_t head_dim, block_size;
    int chosen, dense;
  };
  const std::vector<Row> rows{
      {"sm90", 64, 64, 128, 128},     {"sm90", 128, 512, 128, 128},   {"portable", 32, 64, 64, 128},
      {"portable", 64, 16, 64, 128},  {"portable", 64, 80, 128, 128}, {"portable", 128, 64, 64, 64},
      {"portable", 128, 512, 64, 64}, {"portable", 192, 64, 32, 32},  {"portable", 256, 512, 32, 32},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(::testing::Message() << "row " << &row - rows.data());
    const Config config{.block_size = row.block_size, .top_k = 4};
    const Plan::Impl plan = planned(problem_of(50000, 8, 2, row.head_dim, config), kH200, row.family);
    EXPECT_EQ(plan.cuda->chosen_backward.part_keys, row.chosen);
    EXPECT_EQ(plan.cuda->dense_backward.part_keys, row.dense);
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

TEST(CudaSetup, BackwardTakesAsMuchAsItsInputs) {
  const auto scratch = [](std::int64_t tokens) {
    return backward_workspace_of(planned(problem_of(tokens, 16, 16, 128, {.block_size = 128, .top_k = 8}), kH200));
  };
  const auto inputs = [](std::int64_t tokens) { return static_cast<std::size_t>(tokens) * 16 * 128 * 2 * 4; };
  EXPECT_LE(scratch(65536), 1409 * kMiB);
  EXPECT_LE(scratch(98304), inputs(98304) + kMiB);
  EXPECT_GT(scratch(131072), 1409 * kMiB);
  EXPECT_LE(scratch(262144), 2049 * kMiB);
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

// What training takes beyond tensors, of a problem of the size that is trained on.
TEST(CudaSetup, TrainingIsModest) {
  for (const std::int64_t kv_heads : {16, 4}) {
    const Problem problem = problem_of(1 << 16, 16, kv_heads, 128, {.block_size = 128, .top_k = 8});
    const std::size_t selection = Plan(problem, {.threads = 1}).selection_bytes();
    for (const DeviceLimits& device : {kH200, kA100}) {
      const Plan::Impl plan = planned(problem, device);
      EXPECT_LE(selection + std::max(workspace_of(plan), backward_workspace_of(plan)), 1536 * kMiB)
          << device.name << ", " << kv_heads << " key heads: forward " << workspace_of(plan) << ", backward "
          << backward_workspace_of(plan) << ", selection " << selection;
    }
  }
}

// Whatever the problem is, backward has memory to work in.
TEST(CudaSetup, BackwardAlwaysHasAWorkspace) {
  for (const std::int64_t tokens : {0, 1, 127, 4096}) {
    for (const std::int64_t head_dim : {32, 64, 96, 128, 192, 256}) {
      for (const std::int64_t block_size : {16, 128, 8192}) {
        const Problem problem = problem_of(tokens, 8, 2, head_dim, {.block_size = block_size, .top_k = 4});
        for (const DeviceLimits& device : {kH200, kA100, kB200, kRtx}) {
          const Plan::Impl plan = planned(problem, device);
          EXPECT_GT(backward_workspace_of(plan), kAlignment);
          EXPECT_LE(backward_workspace_of(plan), 2049 * kMiB);
        }
      }
    }
  }
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

// Limits that would do for forward are kept by backward too, or it says which would do.
TEST(CudaSetup, BackwardKeepsALimitOrSaysWhatItNeeds) {
  for (const std::int64_t tokens : {1000, 1 << 16, 1 << 20}) {
    for (const DeviceLimits& device : {kH200, kA100}) {
      const Problem problem = problem_of(tokens, 16, 2, 128, {.block_size = 512, .top_k = 8});
      for (std::size_t asked = kMiB / 4; asked <= 4096 * kMiB; asked *= 2) {
        const std::size_t limit = granted(problem, device, asked);
        const Plan::Impl plan = planned(problem, device, "", limit);
        const std::size_t needed = plan.backward_workspace_limit;
        if (needed == 0) {
          EXPECT_LE(backward_workspace_of(plan), limit) << tokens;
          continue;
        }
        EXPECT_GT(needed, limit);
        EXPECT_EQ(backward_workspace_of(plan), needed);
        const Plan::Impl enough = planned(problem, device, "", needed);
        EXPECT_EQ(enough.backward_workspace_limit, 0U);
        EXPECT_LE(backward_workspace_of(enough), needed) << tokens << ", limit " << limit;
      }
    }
  }
}

// More memory is never too little.
TEST(CudaSetup, BackwardKeepsEveryLimitAboveOneThatItKeeps) {
  const Problem problem = problem_of(1 << 17, 16, 4, 128, {.block_size = 64, .top_k = 8});
  std::size_t kept = 0;
  for (std::size_t limit = 290 * kMiB; limit < 340 * kMiB; limit += kMiB / 16) {
    const Plan::Impl plan = planned(problem, kH200, "", limit);
    if (plan.backward_workspace_limit == 0) {
      kept = limit;
    } else {
      EXPECT_EQ(kept, 0U) << "refused with " << limit << ", which is more";
    }
  }
  EXPECT_GT(kept, 0U);
}

// Each slab of tokens has many rows for each block: with few, units would load keys for next to nothing.
TEST(CudaSetup, BackwardOfLongSequencesTakesLargeSlabs) {
  for (const Problem& problem : {problem_of(1'500'000, 16, 16, 128, {.block_size = 128, .top_k = 8}),
                                 problem_of(1'500'000, 32, 8, 128, {.block_size = 128, .top_k = 8}),
                                 problem_of(10'000'000, 1, 1, 128, {.block_size = 4096, .top_k = 12})}) {
    const Plan::Impl plan = planned(problem, kH200);
    const cuda::BackwardSetup& backward = plan.cuda->chosen_backward;
    const std::int64_t rows = std::int64_t{backward.slab_tokens} * plan.group * plan.slots;
    EXPECT_GE(rows, 64 * plan.max_blocks) << problem.total_q << " tokens, slabs of " << backward.slab_tokens;
    EXPECT_LE(backward_workspace_of(plan), key_sums(problem) + 1536 * kMiB);
  }
}

// The last slab of a call may have fewer heads, tokens or parts than the memory was made for.
TEST(CudaSetup, PartsOfASlabHaveNoMoreUnitsThanTheSlab) {
  for (const std::int64_t tokens : {1 << 10, 5000, 1 << 16}) {
    const Problem problem = problem_of(tokens, 28, 7, 128, {.block_size = 256, .top_k = 8});
    const Plan::Impl plan = planned(problem, kH200);
    const cuda::Shape& shape = plan.cuda->shape;
    const cuda::BackwardSetup& backward = plan.cuda->chosen_backward;
    const cuda::Slab whole{0, backward.slab_heads, 0, backward.slab_tokens};
    const cuda::Pass all{backward.sections, backward.part_keys, 0, backward.parts};
    for (int heads = 1; heads <= whole.heads; ++heads) {
      for (int left = 1; left <= whole.tokens; left += 1 + left / 2) {
        for (int parts = 1; parts <= all.parts; ++parts) {
          const cuda::Slab slab{0, heads, 0, left};
          const cuda::Pass pass{all.sections, all.part_keys, 0, parts};
          EXPECT_LE(cuda::backward_unit_capacity(shape, slab, pass), cuda::backward_unit_capacity(shape, whole, all));
          EXPECT_LE(cuda::dense_backward_unit_capacity(shape, slab, pass),
                    cuda::dense_backward_unit_capacity(shape, whole, all));
          for (const auto capacity : {cuda::share_capacity, cuda::dense_share_capacity}) {
            EXPECT_LE(capacity(shape, slab, pass).shares, capacity(shape, whole, all).shares);
            EXPECT_LE(capacity(shape, slab, pass).splits, capacity(shape, whole, all).splits);
          }
        }
      }
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
