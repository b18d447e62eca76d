#include "stages.h"

#include <cstdio>
#include <utility>

#include "text.h"

namespace moba::cli {
namespace {

void print_row(const std::string& name, double seconds, double total, double flop, const RateUnit& unit) {
  const std::string rate = flop > 0 && seconds > 0 ? format("%.1f", flop / seconds / unit.flops) : "-";
  const double share = total > 0 ? 100.0 * seconds / total : 0.0;
  std::printf("%-8s %12s %7.1f %% %10s\n", name.c_str(), format_seconds(seconds).c_str(), share, rate.c_str());
}

}  // namespace

double total_seconds(const std::vector<StageTime>& times) {
  double seconds = 0;
  for (const StageTime& time : times) seconds += time.seconds;
  return seconds;
}

std::vector<StageTime> fastest_pass(int passes, const std::function<std::vector<StageTime>()>& pass) {
  std::vector<StageTime> best = pass();
  for (int i = 1; i < passes; ++i) {
    std::vector<StageTime> times = pass();
    if (total_seconds(times) < total_seconds(best)) best = std::move(times);
  }
  return best;
}

Results::Results(const Plan& plan) {
  const Problem& problem = plan.problem();
  const Place place(plan);
  outputs.out = allocate(out_memory, place, problem.dtype, {problem.total_q, problem.q_heads, problem.head_dim}, "out");
  outputs.lse = allocate(lse_memory, place, DType::f32, {problem.q_heads, problem.total_q}, "lse");
}

void StageClock::begin(const char* name) {
  progress_.stage(name);
  names_.push_back(name);
  watch_.lap();
}

std::vector<StageTime> StageClock::finish() {
  watch_.lap();
  const std::vector<double> seconds = watch_.seconds();
  std::vector<StageTime> times;
  for (std::size_t i = 0; i < names_.size(); ++i) times.push_back({names_[i], seconds[i]});
  return times;
}

StagedForward::StagedForward(const Plan& plan, const Inputs& inputs)
    : plan_(plan),
      inputs_(inputs),
      rotated_(inputs),
      workspace_(Place(plan), plan.workspace_bytes(), "the workspace"),
      selection_memory_(Place(plan), plan.selection_bytes(), "the selection"),
      selection_(make_selection(plan, selection_memory_.span())),
      results_(plan) {
  const Problem& problem = plan.problem();
  const Place place(plan);
  const std::int64_t d = problem.head_dim;
  centroids_ = allocate(centroids_memory_, place, problem.dtype, {plan.max_blocks(), problem.kv_heads, d}, "centroids");
  if (problem.rope) {
    q_rotated_ = allocate(q_memory_, place, problem.dtype, {problem.total_q, problem.q_heads, d}, "rotated q");
    k_rotated_ = allocate(k_memory_, place, problem.dtype, {problem.total_k, problem.kv_heads, d}, "rotated k");
    rotated_.q = q_rotated_;
    rotated_.k = k_rotated_;
  }
}

void StagedForward::route(StageClock& clock) {
  if (plan_.problem().rope) {
    clock.begin("rope");
    moba::rope(plan_, inputs_, q_rotated_, k_rotated_, workspace());
  }
  clock.begin("pool");
  moba::pool(plan_, rotated_, centroids_, workspace());
  clock.begin("gate");
  moba::gate(plan_, rotated_, centroids_, selection_, workspace());
  clock.begin("index");
  moba::index(plan_, rotated_, selection_, workspace());
}

void StagedForward::route(Progress& progress) {
  StageClock clock(plan_, progress);
  route(clock);
  clock.finish();
}

std::vector<StageTime> StagedForward::run(Progress& progress) {
  StageClock clock(plan_, progress);
  route(clock);
  clock.begin("attend");
  moba::attend(plan_, rotated_, selection_, outputs(), workspace());
  return clock.finish();
}

StageTime StagedForward::run_whole(Progress& progress) {
  StageClock clock(plan_, progress);
  clock.begin("forward");
  moba::forward(plan_, inputs_, outputs(), workspace());
  return clock.finish().front();
}

bool whole_differs(const Plan& plan) { return plan.options().backend == Backend::cuda; }

int warm_ups(const Plan& plan) { return plan.options().backend == Backend::cuda ? 1 : 0; }

StageTime run_dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Workspace workspace,
                    Progress& progress) {
  StageClock clock(plan, progress);
  clock.begin("dense");
  moba::dense(plan, inputs, outputs, workspace);
  return clock.finish().front();
}

void count_flop(std::vector<StageTime>& times, const Arithmetic& arithmetic) {
  for (StageTime& time : times) {
    if (time.name == "pool") time.flop = arithmetic.pool;
    if (time.name == "gate") time.flop = arithmetic.gate;
    if (time.name == "attend") time.flop = arithmetic.attend;
    if (time.name == "total" || time.name == "forward")
      time.flop = arithmetic.pool + arithmetic.gate + arithmetic.attend;
    if (time.name == "dense") time.flop = arithmetic.dense;
    if (time.name == "backward") time.flop = arithmetic.backward;
  }
}

RateUnit::RateUnit(const Plan& plan)
    : name(plan.options().backend == Backend::cuda ? "TFLOP/s" : "GFLOP/s"),
      flops(plan.options().backend == Backend::cuda ? 1e12 : 1e9) {}

void print_stage_table(const std::vector<StageTime>& times, const RateUnit& unit) {
  const double total = total_seconds(times);
  double flop = 0;
  std::printf("%-8s %12s %9s %10s\n", "stage", "time", "share", unit.name);
  for (const StageTime& time : times) {
    print_row(time.name, time.seconds, total, time.flop, unit);
    flop += time.flop;
  }
  if (times.size() > 1) print_row("total", total, total, flop, unit);
}

}  // namespace moba::cli
