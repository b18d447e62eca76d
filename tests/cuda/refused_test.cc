// Refusals that take a device: of calls, one change at a time, before anything is written; and of devices.
#include <functional>

#include "cuda/launch.h"
#include "cuda_test.h"

namespace moba::test {
namespace {

// All arguments of forward and attend, good ones; a test spoils one.
struct Arguments {
  Case c{
      .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 64, .q_lengths = {60, 39}, .k_lengths = {75, 99}};
  Data data{c};
  Plan plan{c.problem(), cuda_options()};
  Attention result{plan.problem()};
  Chosen chosen{plan};
  Mirror mirror{test_stream()};
  DeviceMemory memory{plan.workspace_bytes() + 64};
  Inputs inputs = mirror.read(data.inputs());
  Outputs outputs = mirror.write(result.outputs());
  Selection selection = mirror.write(chosen.selection());
  Workspace workspace = memory.bytes().first(plan.workspace_bytes());
};

struct Refusal {
  std::string message;  // a part of it
  std::function<void(Arguments&)> change;
};

template <class AnyTensor>
void advance(AnyTensor& t, std::int64_t bytes) {
  using Byte = std::conditional_t<std::is_same_v<AnyTensor, Tensor>, std::byte, const std::byte>;
  t.data = static_cast<Byte*>(t.data) + bytes;
}

std::vector<Refusal> refusals() {
  return {
      {"q: is a pointer to memory that is no device's; allowed: memory of CUDA device",
       [](Arguments& a) { a.inputs.q.data = a.data.q.tensor().data; }},
      {"out: is a pointer to memory that is no device's",
       [](Arguments& a) { a.outputs.out.data = a.result.out.tensor().data; }},
      {"lse: is a pointer to memory that is no device's",
       [](Arguments& a) { a.outputs.lse.data = a.result.lse.tensor().data; }},
      {"cu_seqlens_q: is a pointer to memory that is no device's",
       [](Arguments& a) { a.inputs.cu_seqlens_q.data = a.data.cu_seqlens_q->tensor().data; }},
      {"workspace: is a pointer to memory that is no device's",
       [](Arguments& a) {
         static std::vector<std::byte> host;
         host.resize(a.workspace.size());
         a.workspace = host;
       }},
      {"v: is a null pointer", [](Arguments& a) { a.inputs.v.data = nullptr; }},
      {"k.device: is cpu; allowed: cuda", [](Arguments& a) { a.inputs.k.device = Device::cpu; }},
      {"cu_seqlens_k.device: is cpu; allowed: cuda", [](Arguments& a) { a.inputs.cu_seqlens_k.device = Device::cpu; }},
      {"out.device: is cpu; allowed: cuda", [](Arguments& a) { a.outputs.out.device = Device::cpu; }},
      {"q.device_index: is 77; allowed: options.cuda_device", [](Arguments& a) { a.inputs.q.device_index = 77; }},
      {"cu_seqlens_k: is not given", [](Arguments& a) { a.inputs.cu_seqlens_k = {}; }},
      {"q: is not aligned; allowed: addresses that are multiples of 16", [](Arguments& a) { advance(a.inputs.q, 8); }},
      {"k: is not aligned", [](Arguments& a) { advance(a.inputs.k, 2); }},
      {"out: is not aligned", [](Arguments& a) { advance(a.outputs.out, 8); }},
      {"lse: is not aligned; allowed: addresses that are multiples of 4",
       [](Arguments& a) { advance(a.outputs.lse, 2); }},
      {"q.stride[0]: is 257; allowed: multiples of 8 from 8 to 2^35 on cuda",
       [](Arguments& a) { ++a.inputs.q.stride[0]; }},
      {"k.stride[1]: is 68; allowed: multiples of 8 from 8 to 2^35 on cuda",
       [](Arguments& a) { a.inputs.k.stride[1] = 68; }},
      {"v.stride[1]: is 0; allowed: multiples of 8 from 8", [](Arguments& a) { a.inputs.v.stride[1] = 0; }},
      {"q: is spread over more than 64 GiB",
       [](Arguments& a) { a.inputs.q.stride[0] = (std::int64_t{1} << 35) / (a.inputs.q.shape[0] - 1) / 8 * 8 + 8; }},
      {"v.stride[2]: is 2; allowed: 1", [](Arguments& a) { a.inputs.v.stride[2] = 2; }},
      {"out.stride[0]: is 260; allowed: multiples of 8 from 8 to 2^35 on cuda",
       [](Arguments& a) { a.outputs.out.stride[0] = 260; }},
      {"out: is f16", [](Arguments& a) { a.outputs.out.dtype = DType::f16; }},
      {"out: is in memory that q spans", [](Arguments& a) { a.outputs.out.data = const_cast<void*>(a.inputs.q.data); }},
      {"bytes; allowed: at least plan.workspace_bytes()",
       [](Arguments& a) { a.workspace = a.workspace.first(a.workspace.size() - 1); }},
      {"workspace: is a null pointer",
       [](Arguments& a) { a.workspace = Workspace(static_cast<std::byte*>(nullptr), a.workspace.size()); }},
  };
}

class CudaRefused : public CudaTest {};

void expect_refused(const Refusal& refusal, bool attends) {
  SCOPED_TRACE(refusal.message + (attends ? ", attend" : ", forward"));
  Arguments a;
  MOBA_CUDA(cudaStreamSynchronize(test_stream()));
  refusal.change(a);
  try {
    if (attends) {
      attend(a.plan, a.inputs, a.selection, a.outputs, a.workspace, {test_stream()});
    } else {
      forward(a.plan, a.inputs, a.outputs, a.workspace, {test_stream()});
    }
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(refusal.message), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  a.mirror.finish();
  EXPECT_TRUE(a.result.out.untouched() && a.result.lse.untouched());
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left for the caller";
}

TEST_F(CudaRefused, SmallCalls) {
  for (const Refusal& refusal : refusals()) {
    for (const bool attends : {false, true}) expect_refused(refusal, attends);
  }
  expect_refused({"selection.ids.device: is cpu", [](Arguments& a) { a.selection.ids.device = Device::cpu; }}, true);
  expect_refused({"selection.ids: is not aligned", [](Arguments& a) { advance(a.selection.ids, 2); }}, true);
}

// Nothing is wrong with a workspace that starts anywhere.
TEST_F(CudaRefused, SmallUnalignedWorkspaceIsAccepted) {
  Arguments aligned_one, shifted;
  shifted.workspace = shifted.memory.bytes().subspan(13, shifted.plan.workspace_bytes());
  for (Arguments* a : {&aligned_one, &shifted}) {
    forward(a->plan, a->inputs, a->outputs, a->workspace, {test_stream()});
    a->mirror.finish();
  }
  EXPECT_TRUE(aligned_one.result.bits() == shifted.result.bits());
}

TEST_F(CudaRefused, SmallPartials) {
  Arguments a;
  const std::vector<Outputs> partials(49, a.outputs);
  Attention merged(a.plan.problem());
  const Outputs outputs = a.mirror.write(merged.outputs());
  try {
    merge(a.plan, partials, outputs, {test_stream()});
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("number of partials: is 49; allowed: 0 to 48"), std::string::npos)
        << error.what();
  }
  a.mirror.finish();
}

std::string message_of(const Problem& problem, const Options& options) {
  try {
    const Plan plan(problem, options);
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST_F(CudaRefused, Plans) {
  const Case c{.dtype = DType::bf16, .head_dim = 64, .q_lengths = {300}, .k_lengths = {300}};
  EXPECT_EQ(message_of(c.problem(), cuda_options()), "accepted");
  for (const int index : {-1, 1000}) {
    Options options = cuda_options();
    options.cuda_device = index;
    EXPECT_NE(message_of(c.problem(), options).find("options.cuda_device: is " + std::to_string(index)),
              std::string::npos);
  }
  EXPECT_NE(message_of(c.problem(), cuda_options("fast")).find("options.cuda_kernels: is 'fast'"), std::string::npos);
  EXPECT_NE(message_of(c.problem(), cuda_options("", 100)).find("options.workspace_limit: is 100 bytes"),
            std::string::npos);
  const auto refused = [&](const std::string& message, auto change) {
    Problem p = c.problem();
    change(p);
    EXPECT_NE(message_of(p, cuda_options()).find(message), std::string::npos) << message_of(p, cuda_options());
  };
  refused("dtype: is f32", [](Problem& p) { p.dtype = DType::f32; });
  refused("head_dim: is 80", [](Problem& p) { p.head_dim = 80; });
  refused("config.block_size: is 24", [](Problem& p) { p.config.block_size = 24; });
  refused("config.scale: is -1", [](Problem& p) { p.config.scale = -1.0; });
  refused("config.top_k: is 65",
          [](Problem& p) { p.total_k = p.max_seqlen_k = 2000, p.config = {.block_size = 16, .top_k = 65}; });
  static const std::vector<float> table(std::size_t{300} * 32);
  refused("rope.cos.device: is cpu; allowed: cuda", [](Problem& p) {
    p.rope = Rope{};
    p.rope->cos = p.rope->sin = ConstTensor(table.data(), DType::f32, {300, 32});
  });
  refused("rope.cos: is a pointer to memory that is no device's", [](Problem& p) {
    p.rope = Rope{};
    p.rope->cos = p.rope->sin = ConstTensor(table.data(), DType::f32, {300, 32}, Device::cuda, device().index);
  });
}

// A tensor of the device is refused by a plan of the cpu.
TEST_F(CudaRefused, SmallDeviceTensorsOnTheCpu) {
  Arguments a;
  const Plan plan(a.c.problem(), {.threads = 1});
  std::vector<std::byte> workspace(plan.workspace_bytes());
  try {
    forward(plan, a.inputs, a.result.outputs(), workspace);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("q.device: is cuda; allowed: cpu"), std::string::npos) << error.what();
  }
  a.mirror.finish();
}

TEST_F(CudaRefused, TheDeviceIsWhatItSays) {
  const CudaSupport support = cuda_support();
  EXPECT_TRUE(support.built);
  EXPECT_EQ(support.problem, "");
  EXPECT_FALSE(support.driver.empty());
  for (const CudaDevice& d : support.devices) {
    EXPECT_GE(d.major, 8);
    EXPECT_EQ(d.kernels, d.major == 9 && d.minor == 0 ? "sm90" : "portable");
    std::printf("device %d: %s, %d.%d, %zu MiB, %s\n", d.index, d.name.c_str(), d.major, d.minor, d.memory >> 20,
                d.kernels.c_str());
  }
}

}  // namespace
}  // namespace moba::test
