// Forward and backward through the public functions, with the time that each takes.
#pragma once

#include <vector>

#include "device.h"
#include "moba/attention.h"
#include "moba/plan.h"
#include "progress.h"
#include "stages.h"

namespace moba::cli {

// A forward pass that keeps its selection, and backward after it, with all they write. The plan and what they read,
// which lies where the plan computes, must outlive it.
class Training {
 public:
  Training(const Plan& plan, const Inputs& inputs, const ConstTensor& dout);

  // Two stages: "forward" (or "dense", where that is what it is) and "backward".
  std::vector<StageTime> run(Progress& progress);

  const Selection& selection() const { return selection_; }
  const Outputs& results() const { return results_.outputs; }
  const Gradients& gradients() const { return gradients_; }

 private:
  const Plan& plan_;
  const Inputs& inputs_;
  const ConstTensor dout_;
  const PlacedMemory workspace_, selection_memory_;
  Selection selection_;  // empty where every block is chosen
  Results results_;
  PlacedMemory dq_, dk_, dv_;
  Gradients gradients_;
};

}  // namespace moba::cli
