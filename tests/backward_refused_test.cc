// Arguments that backward, dense_backward and the forward that keeps its selection refuse, one change at a time.
#include <algorithm>
#include <functional>

#include "support.h"

namespace moba::test {
namespace {

Case small_case(std::int64_t top_k) {
  return {.q_heads = 4,
          .kv_heads = 2,
          .head_dim = 8,
          .q_lengths = {20, 13},
          .k_lengths = {25, 33},
          .config = {.block_size = 8, .top_k = top_k}};
}
constexpr std::int64_t kFew = 2, kEvery = 8;  // blocks a row; with all of them forward is dense

// Good arguments of the backward functions and of the forward that keeps its selection; a test spoils one.
struct Arguments {
  Case c;
  Data data{c};
  Plan plan{c.problem(), {.threads = 1}};
  std::vector<std::byte> memory =
      std::vector<std::byte>(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()), std::byte{0x5a});
  std::vector<std::byte> untouched_memory = memory, room = std::vector<std::byte>(1 << 16);
  Attention computed{plan.problem()}, written{plan.problem()};
  Chosen read{plan}, kept{plan};
  Array dout_memory = noise_dout(c);
  Slopes slopes{plan.problem()};

  Inputs inputs = data.inputs();
  Selection selection = read.selection(), into = kept.selection();
  Outputs outputs = written.outputs();
  ConstOutputs results;
  ConstTensor dout = std::as_const(dout_memory).tensor();
  Gradients gradients = slopes.gradients();
  Workspace workspace = memory;

  explicit Arguments(std::int64_t top_k = kFew) : c(small_case(top_k)) {
    forward(plan, inputs, selection, computed.outputs(), workspace);
    results = {computed.out.tensor(), computed.lse.tensor()};
    memory = untouched_memory;
  }
  bool untouched() const {
    return slopes.dq.untouched() && slopes.dk.untouched() && slopes.dv.untouched() && written.out.untouched() &&
           written.lse.untouched() && kept.ids.untouched() && kept.counts.untouched() && kept.offsets.untouched() &&
           kept.rows.untouched() && memory == untouched_memory;
  }
};

enum Function { kBackward, kDenseBackward, kForward };

void call(Function function, Arguments& a) {
  switch (function) {
    case kBackward:
      return backward(a.plan, a.inputs, a.selection, a.results, a.dout, a.gradients, a.workspace);
    case kDenseBackward:
      return dense_backward(a.plan, a.inputs, a.results, a.dout, a.gradients, a.workspace);
    case kForward:
      return forward(a.plan, a.inputs, a.into, a.outputs, a.workspace);
  }
}

void expect_refused(Function function, const std::string& starts_with, const std::function<void(Arguments&)>& spoil,
                    std::int64_t top_k = kFew) {
  Arguments a(top_k);
  spoil(a);
  try {
    call(function, a);
    ADD_FAILURE() << "accepted: " << starts_with;
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_TRUE(message.starts_with(starts_with)) << message << "\nwanted: " << starts_with;
    EXPECT_NE(message.find("; allowed: "), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  EXPECT_TRUE(a.untouched()) << starts_with;
}

// A tensor among the arguments, and how to change it.
struct Argument {
  std::string name;
  std::function<void(Arguments&, const std::function<void(Tensor&)>&)> change;
};

void change_tensor(Tensor& tensor, const std::function<void(Tensor&)>& change) { change(tensor); }
void change_tensor(ConstTensor& tensor, const std::function<void(Tensor&)>& change) {
  Tensor view;
  view.data = const_cast<void*>(tensor.data);
  view.dtype = tensor.dtype, view.rank = tensor.rank, view.shape = tensor.shape, view.stride = tensor.stride;
  change(view);
  tensor = view;
}

#define ARGUMENT(name, member)                                                                              \
  Argument {                                                                                                \
    name, [](Arguments& a, const std::function<void(Tensor&)>& change) { change_tensor(a.member, change); } \
  }

TEST(BackwardRefused, Tensors) {
  const Argument tensors[] = {
      ARGUMENT("q", inputs.q),
      ARGUMENT("k", inputs.k),
      ARGUMENT("v", inputs.v),
      ARGUMENT("results.out", results.out),
      ARGUMENT("results.lse", results.lse),
      ARGUMENT("dout", dout),
      ARGUMENT("gradients.dq", gradients.dq),
      ARGUMENT("gradients.dk", gradients.dk),
      ARGUMENT("gradients.dv", gradients.dv),
  };
  for (const Argument& argument : tensors) {
    for (const Function f : {kBackward, kDenseBackward}) {
      const auto refused = [&](const std::string& text, const std::function<void(Tensor&)>& change) {
        expect_refused(f, argument.name + text, [&](Arguments& a) { argument.change(a, change); });
      };
      refused(": is not given; allowed: f32 [", [](Tensor& t) { t = {}; });
      refused(": is f16 [", [](Tensor& t) { t.dtype = DType::f16; });
      refused(": is f32 [21, ", [](Tensor& t) { t.shape[0] = 21; });
      refused(": is a null pointer", [](Tensor& t) { t.data = nullptr; });
      refused(": is not aligned", [](Tensor& t) { t.data = static_cast<std::byte*>(t.data) + 1; });
      refused(".device: is cuda", [](Tensor& t) { t.device = Device::cuda; });
      refused(".stride[0]: is -1", [](Tensor& t) { t.stride[0] = -1; });
      if (argument.name != "results.lse") refused(".stride[2]: is 2", [](Tensor& t) { t.stride[2] = 2; });
      if (argument.name.starts_with("gradients")) refused(".stride[0]: is 0", [](Tensor& t) { t.stride[0] = 0; });
    }
  }
}

// The tensor, contiguous, in memory that has room for any other.
template <class AnyTensor>
void move_to_room(Arguments& a, AnyTensor& tensor) {
  std::size_t bytes = size_in_bytes(tensor.dtype);
  for (int i = 0; i < tensor.rank; ++i) bytes *= static_cast<std::size_t>(tensor.shape[i]);
  std::memcpy(a.room.data(), tensor.data, bytes);
  tensor.data = a.room.data();
}

// Every gradient over everything else.
TEST(BackwardRefused, Overlaps) {
  struct Read {
    std::string name;
    std::function<void(Arguments&)> move;
    bool of_selection = false;
  };
  const Read others[] = {{"q", [](Arguments& a) { move_to_room(a, a.inputs.q); }},
                         {"k", [](Arguments& a) { move_to_room(a, a.inputs.k); }},
                         {"v", [](Arguments& a) { move_to_room(a, a.inputs.v); }},
                         {"cu_seqlens_q", [](Arguments& a) { move_to_room(a, a.inputs.cu_seqlens_q); }},
                         {"cu_seqlens_k", [](Arguments& a) { move_to_room(a, a.inputs.cu_seqlens_k); }},
                         {"results.out", [](Arguments& a) { move_to_room(a, a.results.out); }},
                         {"results.lse", [](Arguments& a) { move_to_room(a, a.results.lse); }},
                         {"dout", [](Arguments& a) { move_to_room(a, a.dout); }},
                         {"selection.ids", [](Arguments& a) { move_to_room(a, a.selection.ids); }, true},
                         {"selection.counts", [](Arguments& a) { move_to_room(a, a.selection.counts); }, true},
                         {"selection.offsets", [](Arguments& a) { move_to_room(a, a.selection.offsets); }, true},
                         {"selection.rows", [](Arguments& a) { move_to_room(a, a.selection.rows); }, true}};
  const std::pair<std::string, Tensor Gradients::*> gradients[] = {
      {"gradients.dq", &Gradients::dq}, {"gradients.dk", &Gradients::dk}, {"gradients.dv", &Gradients::dv}};
  for (const Function f : {kBackward, kDenseBackward}) {
    for (const auto& [name, gradient] : gradients) {
      for (const Read& read : others) {
        if (read.of_selection && f == kDenseBackward) continue;
        expect_refused(f, name + ": is in memory that " + read.name + " spans", [&, to = gradient](Arguments& a) {
          read.move(a);
          (a.gradients.*to).data = a.room.data();
        });
      }
      expect_refused(f, "workspace: is in memory that " + name + " spans", [to = gradient](Arguments& a) {
        (a.gradients.*to).data = a.memory.data() + (64 - reinterpret_cast<std::uintptr_t>(a.memory.data()) % 64) % 64;
      });
    }
    expect_refused(f, "gradients.dk: is in memory that gradients.dq spans",
                   [](Arguments& a) { a.gradients.dq.data = a.gradients.dk.data; });
    expect_refused(f, "gradients.dv: is in memory that gradients.dk spans",
                   [](Arguments& a) { a.gradients.dv.data = a.gradients.dk.data; });
  }
  expect_refused(kForward, "selection.ids: is in memory that q spans",
                 [](Arguments& a) { a.into.ids.data = const_cast<void*>(a.inputs.q.data); });
  expect_refused(kForward, "selection.rows: is in memory that out spans",
                 [](Arguments& a) { a.into.rows.data = a.outputs.out.data; });
}

TEST(BackwardRefused, Workspaces) {
  for (const Function f : {kBackward, kDenseBackward}) {
    expect_refused(f,
                   "workspace: is " + std::to_string(Arguments().plan.backward_workspace_bytes() - 1) +
                       " bytes; allowed: at least plan.backward_workspace_bytes()",
                   [](Arguments& a) { a.workspace = a.workspace.first(a.plan.backward_workspace_bytes() - 1); });
  }
  expect_refused(kForward, "workspace: is 0 bytes; allowed: at least plan.workspace_bytes()",
                 [](Arguments& a) { a.workspace = {}; });
}

TEST(BackwardRefused, Selections) {
  expect_refused(kBackward, "selection.offsets: is not given", [](Arguments& a) { a.selection = {}; });
  expect_refused(kBackward, "selection.rows: is not given", [](Arguments& a) { a.selection.rows = {}; });
  // Not read, but gradients may not overlap them.
  expect_refused(kBackward, "selection.ids: is i32 [33, 3, ", [](Arguments& a) { a.selection.ids.shape[1] = 3; });
  expect_refused(kBackward, "selection.counts: is i32 [32, ", [](Arguments& a) { a.selection.counts.shape[0] = 32; });
  expect_refused(kBackward, "selection.offsets[0]: is -1, as long as it is not written for these ids; allowed: ",
                 [](Arguments& a) { a.read.offsets.as<std::int64_t>(0) = -1; });
  expect_refused(kBackward, "selection.rows of key head 0, block ",
                 [](Arguments& a) { a.read.rows.as<std::int32_t>(0) = 1 << 20; });
  expect_refused(kForward, "selection.ids: is not given", [](Arguments& a) { a.into = {}; });
  expect_refused(kForward, "selection.ids: is i32 [33, 2, ", [](Arguments& a) { a.into.ids.shape[1] = 2; });
  expect_refused(kForward, "selection.offsets: is not given", [](Arguments& a) { a.into.offsets = {}; });
}

// There is nothing to choose, but who gives memory for a selection gives all of it.
TEST(BackwardRefused, SelectionsWhereForwardIsDense) {
  expect_refused(
      kForward, "selection.ids: is not given", [](Arguments& a) { a.into.ids = {}; }, kEvery);
  expect_refused(
      kForward, "selection.offsets: is not given", [](Arguments& a) { a.into.offsets = {}; }, kEvery);
  expect_refused(
      kForward, "selection.offsets: is in memory that out spans",
      [](Arguments& a) { a.into.offsets.data = a.outputs.out.data; }, kEvery);
}

TEST(BackwardRefused, Sequences) {
  for (const Function f : {kBackward, kDenseBackward, kForward}) {
    expect_refused(f, "cu_seqlens_q[2]: is 32", [](Arguments& a) { a.data.cu_seqlens_q->as<std::int32_t>(2) = 32; });
    expect_refused(f, "cu_seqlens_k[1]: is -1", [](Arguments& a) { a.data.cu_seqlens_k->as<std::int32_t>(1) = -1; });
    expect_refused(f, "cu_seqlens_q: is not given", [](Arguments& a) { a.inputs.cu_seqlens_q = {}; });
  }
}

}  // namespace
}  // namespace moba::test
