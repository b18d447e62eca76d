#include "training.h"

#include <algorithm>

#include "memory_use.h"

namespace moba::cli {
namespace {

std::size_t kept_bytes(const Plan& plan) {
  if (plan.forward_is_dense()) return 0;
  return needs_ids_alone(plan) ? plan.ids_bytes() : plan.selection_bytes();
}

Selection kept_selection(const Plan& plan, std::span<std::byte> memory) {
  if (plan.forward_is_dense()) return {};
  if (!needs_ids_alone(plan)) return make_selection(plan, memory);
  const Problem& p = plan.problem();
  return {.ids = Tensor(memory.data(), DType::i32, {p.total_q, p.q_heads, plan.slots()}, Device::cuda,
                        plan.options().cuda_device),
          .counts = {},
          .offsets = {},
          .rows = {}};
}

}  // namespace

Training::Training(const Plan& plan, const Inputs& inputs, const ConstTensor& dout)
    : plan_(plan),
      inputs_(inputs),
      dout_(dout),
      workspace_(Place(plan), std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()), "the workspace"),
      selection_memory_(Place(plan), kept_bytes(plan), "the selection"),
      selection_(kept_selection(plan, selection_memory_.span())),
      results_(plan) {
  const Problem& p = plan.problem();
  const Place place(plan);
  gradients_.dq = allocate(dq_, place, p.dtype, {p.total_q, p.q_heads, p.head_dim}, "dq");
  gradients_.dk = allocate(dk_, place, p.dtype, {p.total_k, p.kv_heads, p.head_dim}, "dk");
  gradients_.dv = allocate(dv_, place, p.dtype, {p.total_k, p.kv_heads, p.head_dim}, "dv");
}

std::vector<StageTime> Training::run(Progress& progress) {
  StageClock clock(plan_, progress);
  clock.begin(plan_.forward_is_dense() ? "dense" : "forward");
  forward(plan_, inputs_, selection_, results_.outputs, workspace_.span());
  clock.begin("backward");
  backward(plan_, inputs_, selection_, {results_.outputs.out, results_.outputs.lse}, dout_, gradients_,
           workspace_.span());
  return clock.finish();
}

}  // namespace moba::cli
