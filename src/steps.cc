// The steps of the backends that run on the host, and how they make up the whole operator.
#include "call.h"
#include "plan_impl.h"

namespace moba {

Call rotated(const Call& given, const Intermediates& memory) {
  if (!given.plan.rope) return given;
  given.plan.steps->rope(given, memory.q_rotated, memory.k_rotated);
  Call call = given;
  call.q = memory.q_rotated;
  call.k = memory.k_rotated;
  return call;
}

namespace {

void forward_by_steps(const Call& given, const Intermediates& memory, const Outputs& outputs) {
  const Steps& steps = *given.plan.steps;
  const Call call = rotated(given, memory);
  steps.pool(call, memory.centroids);
  steps.gate(call, memory.centroids, memory.selection);
  steps.index(call, memory.selection);
  steps.attend(call, memory.selection, outputs);
}

// backward, which reads the transpose here, is to know that there is none.
void choose_none(const Call&, const Selection& selection) { mark_stale(selection); }

}  // namespace

const Steps reference::kSteps = {reference::rope,   reference::pool,     reference::gate,          reference::index,
                                 reference::attend, reference::dense,    reference::merge,         forward_by_steps,
                                 choose_none,       reference::backward, reference::dense_backward};
const Steps cpu::kSteps = {cpu::rope,  cpu::pool,        cpu::gate,   cpu::index,    cpu::attend,        cpu::dense,
                           cpu::merge, forward_by_steps, choose_none, cpu::backward, cpu::dense_backward};

}  // namespace moba
