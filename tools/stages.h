// MoBA stage by stage, through the public functions, with the time that each takes.
#pragma once

#include <string>
#include <vector>

#include "buffer.h"
#include "moba/attention.h"
#include "moba/plan.h"
#include "progress.h"

namespace moba::cli {

struct StageTime {
  std::string name;
  double seconds = 0;
  double flop = 0;  // that the stage's formula asks for; 0: it has none to speak of
};

double total_seconds(const std::vector<StageTime>& times);

// out [Tq, Hq, d] and lse [Hq, Tq] with their memory.
struct Results {
  explicit Results(const Plan& plan);

  Buffer out_memory, lse_memory;
  Outputs outputs;
};

// One MoBA forward pass and everything it makes on the way. The plan and the inputs must outlive it.
class StagedForward {
 public:
  StagedForward(const Plan& plan, const Inputs& inputs);

  // rope (if the plan has one), pool, gate, index.
  std::vector<StageTime> route(Progress& progress);
  // attend, over what route chose.
  StageTime attend(Progress& progress);
  // Both.
  std::vector<StageTime> run(Progress& progress);

  const Inputs& rotated() const { return rotated_; }  // the inputs with q and k after rope
  const Selection& selection() const { return selection_; }
  const Outputs& outputs() const { return results_.outputs; }

 private:
  template <class Function>
  StageTime timed(Progress& progress, const char* name, Function&& function) const;

  const Plan& plan_;
  const Inputs& inputs_;
  Inputs rotated_;
  Buffer workspace_, q_memory_, k_memory_, centroids_memory_, selection_memory_;
  Tensor q_rotated_, k_rotated_, centroids_;
  Selection selection_;
  Results results_;
};

// Full attention over the same inputs, rope included.
StageTime run_dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Progress& progress);

// Fills in the arithmetic of every stage, for sequences that start at the given offsets.
void count_flop(std::vector<StageTime>& times, const Arithmetic& arithmetic);

// Prints "stage  time  share  GFLOP/s", a line per stage and one for all of them.
void print_stage_table(const std::vector<StageTime>& times);

}  // namespace moba::cli
