// What backward, dense_backward and the forward that keeps its selection refuse on a device, one change at a time,
// before anything is written.
#include <algorithm>
#include <functional>

#include "cuda/launch.h"
#include "cuda_test.h"

namespace moba::test {
namespace {

enum Function { kBackward, kDenseBackward, kForward };

Case small_case(std::int64_t top_k) {
  Case c{
      .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 64, .q_lengths = {60, 39}, .k_lengths = {75, 99}};
  c.config.top_k = top_k;
  return c;
}
constexpr std::int64_t kFew = 2, kEvery = 7;  // blocks a row; with all of them forward is dense

// All arguments of the three, good ones; a test spoils one.
struct Arguments {
  explicit Arguments(std::int64_t top_k = kFew) : c(small_case(top_k)) {}

  Case c;
  Data data{c};
  Plan plan{c.problem(), cuda_options()};
  Attention result{plan.problem()}, read{plan.problem()};
  Chosen chosen{plan}, kept{plan};
  Array dout_memory = noise_dout(c);
  Slopes slopes{plan.problem()};
  Mirror mirror{test_stream()};
  DeviceMemory memory{std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()) + 64};
  DeviceMemory room{1 << 16};
  Inputs inputs = mirror.read(data.inputs());
  Outputs outputs = mirror.write(result.outputs());
  ConstOutputs results = mirror.read(ConstOutputs{read.out.tensor(), read.lse.tensor()});
  Selection selection = mirror.read(chosen.selection()), into = mirror.write(kept.selection());
  ConstTensor dout = mirror.read(std::as_const(dout_memory).tensor(), "dout");
  Gradients gradients = mirror.write(slopes.gradients());
  Workspace workspace = memory.bytes().first(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()));

  bool untouched() const {
    return slopes.dq.untouched() && slopes.dk.untouched() && slopes.dv.untouched() && result.out.untouched() &&
           result.lse.untouched() && kept.ids.untouched() && kept.counts.untouched() && kept.offsets.untouched() &&
           kept.rows.untouched();
  }
};

void call(Function function, const Arguments& a) {
  switch (function) {
    case kBackward:
      return backward(a.plan, a.inputs, a.selection, a.results, a.dout, a.gradients, a.workspace, {test_stream()});
    case kDenseBackward:
      return dense_backward(a.plan, a.inputs, a.results, a.dout, a.gradients, a.workspace, {test_stream()});
    case kForward:
      return forward(a.plan, a.inputs, a.into, a.outputs, a.workspace, {test_stream()});
  }
}

void expect_refused(const std::vector<Function>& functions, const std::string& part,
                    const std::function<void(Arguments&)>& spoil, std::int64_t top_k = kFew) {
  for (const Function function : functions) {
    SCOPED_TRACE(::testing::Message() << part << ", function " << function);
    Arguments a(top_k);
    MOBA_CUDA(cudaStreamSynchronize(test_stream()));
    spoil(a);
    try {
      call(function, a);
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(part), std::string::npos) << message;
      EXPECT_NE(message.find("; allowed: "), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    }
    a.mirror.finish();
    EXPECT_TRUE(a.untouched());
    EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left for the caller";
  }
}

const std::vector<Function> kBackwards{kBackward, kDenseBackward};

struct Gradient {
  std::string name;
  Tensor Gradients::*tensor;
  Array Slopes::*memory;
};
const Gradient kGradients[] = {{"gradients.dq", &Gradients::dq, &Slopes::dq},
                               {"gradients.dk", &Gradients::dk, &Slopes::dk},
                               {"gradients.dv", &Gradients::dv, &Slopes::dv}};

template <class AnyTensor>
void advance(AnyTensor& t, std::int64_t bytes) {
  using Byte = std::conditional_t<std::is_same_v<AnyTensor, Tensor>, std::byte, const std::byte>;
  t.data = static_cast<Byte*>(t.data) + bytes;
}

class CudaRefusedBackward : public CudaTest {};

TEST_F(CudaRefusedBackward, SmallGradients) {
  for (const Gradient& gradient : kGradients) {
    const auto refused = [&](const std::string& part, const std::function<void(Tensor&)>& change) {
      expect_refused(kBackwards, gradient.name + part, [&](Arguments& a) { change(a.gradients.*gradient.tensor); });
    };
    expect_refused(
        kBackwards, gradient.name + ": is a pointer to memory that is no device's; allowed: memory of CUDA",
        [&](Arguments& a) { (a.gradients.*gradient.tensor).data = (a.slopes.*gradient.memory).tensor().data; });
    refused(": is not given", [](Tensor& t) { t = {}; });
    refused(": is a null pointer", [](Tensor& t) { t.data = nullptr; });
    refused(".device: is cpu; allowed: cuda", [](Tensor& t) { t.device = Device::cpu; });
    refused(".device_index: is 77", [](Tensor& t) { t.device_index = 77; });
    refused(": is f16 [", [](Tensor& t) { t.dtype = DType::f16; });
    refused(": is bf16 [1, ", [](Tensor& t) { t.shape[0] = 1; });
    refused(": is not aligned; allowed: addresses that are multiples of 16", [](Tensor& t) { advance(t, 8); });
    refused(".stride[0]: is 260; allowed: multiples of 8", [](Tensor& t) { t.stride[0] = 260; });
    refused(".stride[0]: is 8; allowed: at least ", [](Tensor& t) { t.stride[0] = 8; });
    refused(".stride[2]: is 2", [](Tensor& t) { t.stride[2] = 2; });
  }
}

TEST_F(CudaRefusedBackward, SmallOverlaps) {
  for (const Gradient& gradient : kGradients) {
    // What is read moves to memory that has room for any gradient.
    const auto refused = [&](const std::vector<Function>& functions, const std::string& name, const auto& read) {
      expect_refused(functions, gradient.name + ": is in memory that " + name + " spans",
                     [&](Arguments& a) { read(a).data = (a.gradients.*gradient.tensor).data = a.room.data(); });
    };
    refused(kBackwards, "q", [](Arguments& a) -> ConstTensor& { return a.inputs.q; });
    refused(kBackwards, "k", [](Arguments& a) -> ConstTensor& { return a.inputs.k; });
    refused(kBackwards, "v", [](Arguments& a) -> ConstTensor& { return a.inputs.v; });
    refused(kBackwards, "cu_seqlens_k", [](Arguments& a) -> ConstTensor& { return a.inputs.cu_seqlens_k; });
    refused(kBackwards, "dout", [](Arguments& a) -> ConstTensor& { return a.dout; });
    refused(kBackwards, "results.out", [](Arguments& a) -> ConstTensor& { return a.results.out; });
    refused(kBackwards, "results.lse", [](Arguments& a) -> ConstTensor& { return a.results.lse; });
    refused({kBackward}, "selection.ids", [](Arguments& a) -> Tensor& { return a.selection.ids; });
    refused({kBackward}, "selection.counts", [](Arguments& a) -> Tensor& { return a.selection.counts; });
    refused({kBackward}, "selection.offsets", [](Arguments& a) -> Tensor& { return a.selection.offsets; });
    refused({kBackward}, "selection.rows", [](Arguments& a) -> Tensor& { return a.selection.rows; });
    expect_refused(kBackwards, "workspace: is in memory that " + gradient.name + " spans", [&](Arguments& a) {
      a.workspace = a.memory.bytes();
      (a.gradients.*gradient.tensor).data = a.memory.data();
    });
  }
  expect_refused(kBackwards, "gradients.dk: is in memory that gradients.dq spans",
                 [](Arguments& a) { a.gradients.dq.data = a.gradients.dk.data; });
  expect_refused(kBackwards, "gradients.dv: is in memory that gradients.dk spans",
                 [](Arguments& a) { a.gradients.dv.data = a.gradients.dk.data; });
  expect_refused({kForward}, "selection.ids: is in memory that q spans",
                 [](Arguments& a) { a.into.ids.data = const_cast<void*>(a.inputs.q.data); });
}

TEST_F(CudaRefusedBackward, SmallWhatIsRead) {
  expect_refused(kBackwards, "results.out: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.results.out.data = a.read.out.tensor().data; });
  expect_refused(kBackwards, "results.lse: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.results.lse.data = a.read.lse.tensor().data; });
  expect_refused(kBackwards, "results.lse: is not given", [](Arguments& a) { a.results.lse = {}; });
  expect_refused(kBackwards, "dout: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.dout.data = a.dout_memory.tensor().data; });
  expect_refused(kBackwards, "dout: is not aligned", [](Arguments& a) { advance(a.dout, 8); });
  expect_refused(kBackwards, "q: is a null pointer", [](Arguments& a) { a.inputs.q.data = nullptr; });
  expect_refused(kBackwards, "cu_seqlens_q: is not given", [](Arguments& a) { a.inputs.cu_seqlens_q = {}; });
}

TEST_F(CudaRefusedBackward, SmallSelections) {
  expect_refused({kBackward}, "selection.ids: is not given", [](Arguments& a) { a.selection = {}; });
  expect_refused({kBackward}, "selection.ids: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.selection.ids.data = a.chosen.ids.tensor().data; });
  expect_refused({kBackward}, "selection.ids.device: is cpu",
                 [](Arguments& a) { a.selection.ids.device = Device::cpu; });
  expect_refused({kBackward}, "selection.ids: is i32 [99, 3, ", [](Arguments& a) { a.selection.ids.shape[1] = 3; });
  expect_refused({kBackward}, "selection.counts: is i32 [98, ", [](Arguments& a) { a.selection.counts.shape[0] = 98; });
  expect_refused({kBackward}, "selection.offsets: is f32 [",
                 [](Arguments& a) { a.selection.offsets.dtype = DType::f32; });
  expect_refused({kBackward}, "selection.rows: is i32 [1]", [](Arguments& a) { a.selection.rows.shape[0] = 1; });
  expect_refused({kForward}, "selection.ids: is not given", [](Arguments& a) { a.into = {}; });
  expect_refused({kForward}, "selection.ids: is i32 [99, 2, ", [](Arguments& a) { a.into.ids.shape[1] = 2; });
  expect_refused({kForward}, "selection.ids: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.into.ids.data = a.kept.ids.tensor().data; });
  expect_refused({kForward}, "selection.counts: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.into.counts.data = a.kept.counts.tensor().data; });
  expect_refused({kForward}, "selection.offsets: is a pointer to memory that is no device's",
                 [](Arguments& a) { a.into.offsets.data = a.kept.offsets.tensor().data; });
  expect_refused({kForward}, "selection.rows: is i32 [1]", [](Arguments& a) { a.into.rows.shape[0] = 1; });
}

// Dense kernels need no selection, but who asks for one wants backward to have its ids.
TEST_F(CudaRefusedBackward, SmallSelectionsWhereForwardIsDense) {
  expect_refused(
      {kForward}, "selection.ids: is not given", [](Arguments& a) { a.into.ids = {}; }, kEvery);
  expect_refused(
      {kForward}, "selection.ids: is not given",
      [](Arguments& a) {
        const Tensor offsets = a.into.offsets;
        a.into = {};
        a.into.offsets = offsets;
      },
      kEvery);
  expect_refused(
      {kForward}, "selection.ids: is i32 [99, 2, ", [](Arguments& a) { a.into.ids.shape[1] = 2; }, kEvery);
}

TEST_F(CudaRefusedBackward, SmallWorkspaces) {
  expect_refused(kBackwards, "bytes; allowed: at least plan.backward_workspace_bytes()",
                 [](Arguments& a) { a.workspace = a.workspace.first(a.plan.backward_workspace_bytes() - 1); });
  expect_refused({kForward}, "bytes; allowed: at least plan.workspace_bytes()",
                 [](Arguments& a) { a.workspace = a.workspace.first(a.plan.workspace_bytes() - 1); });
  expect_refused(kBackwards, "workspace: is a null pointer",
                 [](Arguments& a) { a.workspace = Workspace(static_cast<std::byte*>(nullptr), a.workspace.size()); });
  std::vector<std::byte> host(Arguments().workspace.size());
  expect_refused({kBackward, kDenseBackward, kForward}, "workspace: is a pointer to memory that is no device's",
                 [&](Arguments& a) { a.workspace = host; });
}

// Nothing is wrong with a workspace that starts anywhere.
TEST_F(CudaRefusedBackward, SmallUnalignedWorkspaceIsAccepted) {
  std::vector<std::vector<std::uint64_t>> bits;
  for (const std::size_t shift : {0, 13}) {
    Arguments a;
    a.workspace = a.memory.bytes().subspan(shift, a.workspace.size());
    const ConstOutputs seen{a.outputs.out, a.outputs.lse};
    forward(a.plan, a.inputs, a.into, a.outputs, a.workspace, {test_stream()});
    backward(a.plan, a.inputs, a.into, seen, a.dout, a.gradients, a.workspace, {test_stream()});
    a.mirror.finish();
    bits.push_back(a.slopes.bits());
  }
  EXPECT_TRUE(bits[0] == bits[1]);
}

}  // namespace
}  // namespace moba::test
