// MoBA stage by stage, through the public functions, with the time that each takes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "device.h"
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

// The fastest of so many passes, which is the one that other programs disturbed least.
std::vector<StageTime> fastest_pass(int passes, const std::function<std::vector<StageTime>()>& pass);

// out [Tq, Hq, d] and lse [Hq, Tq] with their memory, where the plan computes.
struct Results {
  explicit Results(const Plan& plan);

  PlacedMemory out_memory, lse_memory;
  Outputs outputs;
};

// The stages of one pass while they run.
class StageClock {
 public:
  StageClock(const Plan& plan, Progress& progress) : watch_(plan), progress_(progress) {}

  // What is called from here on is this stage.
  void begin(const char* name);
  // Ends the last stage.
  std::vector<StageTime> finish();

 private:
  Stopwatch watch_;
  Progress& progress_;
  std::vector<const char*> names_;
};

// One MoBA forward pass and everything it makes on the way. The plan and the inputs, which lie where the plan computes,
// must outlive it.
class StagedForward {
 public:
  StagedForward(const Plan& plan, const Inputs& inputs);

  // rope (if the plan has one), pool, gate, index.
  void route(Progress& progress);
  // These, then attend over what they chose.
  std::vector<StageTime> run(Progress& progress);
  // forward(): the same in one call, into the same outputs.
  StageTime run_whole(Progress& progress);

  const Inputs& rotated() const { return rotated_; }  // the inputs with q and k after rope
  const Selection& selection() const { return selection_; }
  const Outputs& outputs() const { return results_.outputs; }
  Workspace workspace() const { return workspace_.span(); }

 private:
  void route(StageClock& clock);

  const Plan& plan_;
  const Inputs& inputs_;
  Inputs rotated_;
  PlacedMemory workspace_, q_memory_, k_memory_, centroids_memory_, selection_memory_;
  Tensor q_rotated_, k_rotated_, centroids_;
  Selection selection_;
  Results results_;
};

// Whether run_whole() is to be timed beside the stages: where attend reads the transpose that index makes, as on the
// cpu, they add up to the whole; on a GPU attend makes its own.
bool whole_differs(const Plan& plan);
inline constexpr const char* kWholeDiffers = "forward: all in one call; attend by itself repeats what index did";

// Passes before the one whose time is told: a GPU loads its kernels in the first.
int warm_ups(const Plan& plan);

// Full attention over the same inputs, rope included.
StageTime run_dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Workspace workspace,
                    Progress& progress);

// Fills in the arithmetic of every stage, for sequences that start at the given offsets.
void count_flop(std::vector<StageTime>& times, const Arithmetic& arithmetic);

// The unit in which rates of a plan are printed.
struct RateUnit {
  explicit RateUnit(const Plan& plan);

  const char* name;  // "GFLOP/s"
  double flops;
};

// Prints "stage  time  share  GFLOP/s", a line per stage and one for all of them.
void print_stage_table(const std::vector<StageTime>& times, const RateUnit& unit);

}  // namespace moba::cli
