#include "stages.h"

#include <chrono>
#include <cstdio>

#include "text.h"

namespace moba::cli {
namespace {

// A contiguous tensor in memory of its own.
Tensor allocate(Buffer& memory, DType dtype, std::initializer_list<std::int64_t> shape) {
  Tensor tensor(nullptr, dtype, shape);
  memory = Buffer(bytes_of(tensor));
  tensor.data = memory.data();
  return tensor;
}

void print_row(const std::string& name, double seconds, double total, double flop) {
  const std::string rate = flop > 0 && seconds > 0 ? format("%.1f", flop / seconds * 1e-9) : "-";
  const double share = total > 0 ? 100.0 * seconds / total : 0.0;
  std::printf("%-8s %12s %7.1f %% %10s\n", name.c_str(), format_seconds(seconds).c_str(), share, rate.c_str());
}

}  // namespace

double total_seconds(const std::vector<StageTime>& times) {
  double seconds = 0;
  for (const StageTime& time : times) seconds += time.seconds;
  return seconds;
}

Results::Results(const Plan& plan) {
  const Problem& problem = plan.problem();
  outputs.out = allocate(out_memory, problem.dtype, {problem.total_q, problem.q_heads, problem.head_dim});
  outputs.lse = allocate(lse_memory, DType::f32, {problem.q_heads, problem.total_q});
}

StagedForward::StagedForward(const Plan& plan, const Inputs& inputs)
    : plan_(plan),
      inputs_(inputs),
      rotated_(inputs),
      workspace_(plan.workspace_bytes()),
      selection_memory_(plan.selection_bytes()),
      selection_(make_selection(plan, selection_memory_.span())),
      results_(plan) {
  const Problem& problem = plan.problem();
  const std::int64_t d = problem.head_dim;
  centroids_ = allocate(centroids_memory_, problem.dtype, {plan.max_blocks(), problem.kv_heads, d});
  if (problem.rope) {
    rotated_.q = q_rotated_ = allocate(q_memory_, problem.dtype, {problem.total_q, problem.q_heads, d});
    rotated_.k = k_rotated_ = allocate(k_memory_, problem.dtype, {problem.total_k, problem.kv_heads, d});
  }
}

template <class Function>
StageTime StagedForward::timed(Progress& progress, const char* name, Function&& function) const {
  progress.stage(name);
  const auto begin = std::chrono::steady_clock::now();
  function();
  return {name, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count()};
}

std::vector<StageTime> StagedForward::route(Progress& progress) {
  const Workspace workspace = workspace_.span();
  std::vector<StageTime> times;
  if (plan_.problem().rope) {
    times.push_back(timed(progress, "rope", [&] { moba::rope(plan_, inputs_, q_rotated_, k_rotated_, workspace); }));
  }
  times.push_back(timed(progress, "pool", [&] { moba::pool(plan_, rotated_, centroids_, workspace); }));
  times.push_back(timed(progress, "gate", [&] { moba::gate(plan_, rotated_, centroids_, selection_, workspace); }));
  times.push_back(timed(progress, "index", [&] { moba::index(plan_, rotated_, selection_, workspace); }));
  return times;
}

StageTime StagedForward::attend(Progress& progress) {
  return timed(progress, "attend",
               [&] { moba::attend(plan_, rotated_, selection_, results_.outputs, workspace_.span()); });
}

std::vector<StageTime> StagedForward::run(Progress& progress) {
  std::vector<StageTime> times = route(progress);
  times.push_back(attend(progress));
  return times;
}

StageTime run_dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Progress& progress) {
  const Buffer workspace(plan.workspace_bytes());
  progress.stage("dense");
  const auto begin = std::chrono::steady_clock::now();
  moba::dense(plan, inputs, outputs, workspace.span());
  return {"dense", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count()};
}

void count_flop(std::vector<StageTime>& times, const Arithmetic& arithmetic) {
  for (StageTime& time : times) {
    if (time.name == "pool") time.flop = arithmetic.pool;
    if (time.name == "gate") time.flop = arithmetic.gate;
    if (time.name == "attend") time.flop = arithmetic.attend;
    if (time.name == "dense") time.flop = arithmetic.dense;
  }
}

void print_stage_table(const std::vector<StageTime>& times) {
  const double total = total_seconds(times);
  double flop = 0;
  std::printf("%-8s %12s %9s %10s\n", "stage", "time", "share", "GFLOP/s");
  for (const StageTime& time : times) {
    print_row(time.name, time.seconds, total, time.flop);
    flop += time.flop;
  }
  if (times.size() > 1) print_row("total", total, total, flop);
}

}  // namespace moba::cli
