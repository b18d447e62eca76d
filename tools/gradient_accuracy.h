// Gradients held against the reference backend, which computes in float64.
#pragma once

#include "float64.h"
#include "moba/attention.h"
#include "moba/plan.h"
#include "progress.h"

namespace moba::cli {

struct GradientErrors {
  RowErrors dq, dk, dv;
};

// Bytes that check_gradients takes beside what it is given.
double gradient_accuracy_bytes(const Plan& plan);

// What `plan` computed from these inputs against float64 gradients of the same blocks, out and lse: |x - float64| of a
// row over |float64| of it, or of an average row (root mean square) where that is longer. `ids` are those of the
// selection; not read where every block is chosen. All on the host, contiguous.
GradientErrors check_gradients(const Plan& plan, const Inputs& inputs, const ConstTensor& ids, const Outputs& results,
                               const ConstTensor& dout, const Gradients& gradients, Progress& progress);

}  // namespace moba::cli
