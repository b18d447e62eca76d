#include "gradient_accuracy.h"

#include <cstring>

#include "memory_use.h"
#include "stages.h"

namespace moba::cli {
namespace {

// The reference's plans: as `plan`, for its q and k rotated and rounded as the operator says; in float32 with these as
// they are, for the gradients; and in float32 with the rope, to turn the gradients back.
struct GradientPlans {
  explicit GradientPlans(const Plan& plan)
      : own(plan.problem(), reference_options()),
        exact(exact_problem(plan.problem()), reference_options()),
        turning(in_float32(plan.problem()), reference_options()) {}

  const Plan own, exact, turning;

 private:
  static Problem in_float32(Problem problem) {
    problem.dtype = DType::f32;
    return problem;
  }
};

// Tensors of the shapes of q and k, with their memory.
struct Pair {
  explicit Pair(const Problem& problem) {
    q = allocate(q_memory, {}, problem.dtype, {problem.total_q, problem.q_heads, problem.head_dim}, "q");
    k = allocate(k_memory, {}, problem.dtype, {problem.total_k, problem.kv_heads, problem.head_dim}, "k");
  }

  PlacedMemory q_memory, k_memory;
  Tensor q, k;
};

// The sign of the second dimension of every pair that a rope turns, in a float32 tensor.
void mirror(const Rope& rope, const Tensor& x) {
  const std::int64_t rows = x.shape[0] * x.shape[1], d = x.shape[2], pairs = rope.rotary_dim / 2;
  const bool half_split = rope.style == RopeStyle::half_split;
  for (std::int64_t row = 0; row < rows; ++row) {
    float* values = static_cast<float*>(x.data) + row * d;
    for (std::int64_t i = 0; i < pairs; ++i) {
      float& second = values[half_split ? i + pairs : 2 * i + 1];
      second = -second;
    }
  }
}

// Gradients of rotated q and k to those of the unrotated ones. The transpose of a rotation is the rotation between two
// reflections, whatever the frequencies and the magnitude are.
void turn_back(const Plan& plan, const Inputs& inputs, const Pair& gradients) {
  const Rope& rope = *plan.problem().rope;
  mirror(rope, gradients.q);
  mirror(rope, gradients.k);
  Inputs given = inputs;
  given.q = gradients.q;
  given.k = gradients.k;
  const Pair turned(plan.problem());
  const Buffer workspace(plan.workspace_bytes());
  moba::rope(plan, given, turned.q, turned.k, workspace.span());
  mirror(rope, turned.q);
  mirror(rope, turned.k);
  std::memcpy(gradients.q.data, turned.q.data, bytes_of(turned.q));
  std::memcpy(gradients.k.data, turned.k.data, bytes_of(turned.k));
}

// q, k and v that the operator attends to, in float32.
class WideInputs {
 public:
  WideInputs(const Plan& own, const Inputs& given) : inputs_(given) {
    if (own.problem().rope) {
      const Pair rotated(own.problem());
      const Buffer workspace(own.workspace_bytes());
      moba::rope(own, given, rotated.q, rotated.k, workspace.span());
      inputs_.q = widen(rotated.q, q_);
      inputs_.k = widen(rotated.k, k_);
    } else {
      inputs_.q = widen(given.q, q_);
      inputs_.k = widen(given.k, k_);
    }
    inputs_.v = widen(given.v, v_);
  }

  const Inputs& inputs() const { return inputs_; }

 private:
  Buffer q_, k_, v_;
  Inputs inputs_;
};

// The same blocks as a selection of another plan of the same shapes.
Selection same_blocks(const Plan& plan, const Inputs& inputs, const ConstTensor& ids, Buffer& memory) {
  if (plan.forward_is_dense()) return {};
  memory = Buffer(plan.selection_bytes());
  const Selection same = make_selection(plan, memory.span());
  std::memcpy(same.ids.data, ids.data, bytes_of(ids));
  const Buffer workspace(plan.workspace_bytes());
  moba::index(plan, inputs, same, workspace.span());
  return same;
}

RowErrors gradient_errors(const Tensor& x, const Tensor& expected) {
  return row_errors(x, expected, average_row(expected));
}

}  // namespace

double gradient_accuracy_bytes(const Plan& plan) {
  const GradientPlans plans(plan);
  const MemoryUse own = memory_use(plans.own), exact = memory_use(plans.exact);
  const double rotated = plan.problem().rope ? own.q + own.k + own.workspace + exact.q + exact.k : 0.0;
  // Inside, the reference holds out and dout (in memory that grows by doubling), lse and the gradients in float64, so
  // too the rows of one key head with their gradients, and the blocks of each row.
  const double slots = static_cast<double>(plan.slots());
  const double inside = 2 * (4 * exact.out + exact.lse + exact.inputs()) +
                        4 * exact.inputs() / static_cast<double>(plan.problem().kv_heads) +
                        exact.lse / sizeof(float) * (16 * slots + 64);
  return rotated + 2 * (exact.inputs() + exact.out) + exact.selection + exact.workspace + exact.backward_workspace +
         inside;
}

GradientErrors check_gradients(const Plan& plan, const Inputs& inputs, const ConstTensor& ids, const Outputs& results,
                               const ConstTensor& dout, const Gradients& gradients, Progress& progress) {
  const GradientPlans plans(plan);
  progress.stage("float64 gradients");
  const WideInputs wide(plans.own, inputs);
  Buffer out_memory, dout_memory, selection_memory, dv_memory(bytes_of(wide.inputs().v));
  const Selection same = same_blocks(plans.exact, wide.inputs(), ids, selection_memory);
  const ConstOutputs seen{widen(results.out, out_memory), results.lse};
  const Pair expected(plans.exact.problem());
  const Tensor& dk = expected.k;
  const Tensor dv(dv_memory.data(), DType::f32, {dk.shape[0], dk.shape[1], dk.shape[2]});
  const Buffer workspace(plans.exact.backward_workspace_bytes());
  moba::backward(plans.exact, wide.inputs(), same, seen, widen(dout, dout_memory), {expected.q, dk, dv},
                 workspace.span());
  if (plan.problem().rope) turn_back(plans.turning, wide.inputs(), expected);
  return {gradient_errors(gradients.dq, expected.q), gradient_errors(gradients.dk, dk),
          gradient_errors(gradients.dv, dv)};
}

}  // namespace moba::cli
