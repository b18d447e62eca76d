// moba compare: MoBA against full attention and against float64, on the tensors of a file.
#include <algorithm>
#include <cstdio>

#include "accuracy.h"
#include "attention_file.h"
#include "commands.h"
#include "describe.h"
#include "kept_mass.h"
#include "memory_use.h"
#include "output_file.h"
#include "picture.h"
#include "stages.h"
#include "text.h"

namespace moba::cli {
namespace {

// The fastest of `repeat` passes, which is the one that other programs disturbed least.
std::vector<StageTime> fastest_forward(StagedForward& forward, int repeat, Progress& progress) {
  std::vector<StageTime> best = forward.run(progress);
  for (int i = 1; i < repeat; ++i) {
    std::vector<StageTime> times = forward.run(progress);
    if (total_seconds(times) < total_seconds(best)) best = std::move(times);
  }
  return best;
}

StageTime fastest_dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, int repeat,
                        Progress& progress) {
  StageTime best = run_dense(plan, inputs, outputs, progress);
  for (int i = 1; i < repeat; ++i) {
    const StageTime time = run_dense(plan, inputs, outputs, progress);
    if (time.seconds < best.seconds) best = time;
  }
  return best;
}

void print_times(std::vector<StageTime> moba, StageTime dense, const Arithmetic& arithmetic) {
  count_flop(moba, arithmetic);
  print_stage_table(moba);
  const double flop = arithmetic.pool + arithmetic.gate + arithmetic.attend;
  const double rate = dense.seconds > 0 ? arithmetic.dense / dense.seconds * 1e-9 : 0;
  std::printf("%-8s %12s %20.1f\n", "dense", format_seconds(dense.seconds).c_str(), rate);
  std::printf("\nspeed-up over dense: %.2f in time, %.2f in arithmetic\n", dense.seconds / total_seconds(moba),
              flop > 0 ? arithmetic.dense / flop : 1.0);
}

void print_errors(const char* name, const RowErrors& errors) {
  std::printf("%-8s %12.2e %12.2e", name, errors.max, errors.median);
  if (errors.not_finite > 0) std::printf("   and %lld rows not finite", static_cast<long long>(errors.not_finite));
  std::printf("\n");
}

void print_accuracy(const Accuracy& accuracy) {
  std::printf("error against float64, relative per row, %lld rows\n", static_cast<long long>(accuracy.rows));
  std::printf("%-8s %12s %12s\n", "", "max", "median");
  print_errors("MoBA", accuracy.moba);
  print_errors("dense", accuracy.dense);
  std::printf("same blocks as float64 in %lld of %lld rows\n", static_cast<long long>(accuracy.same_selection),
              static_cast<long long>(accuracy.rows));
}

}  // namespace

void compare(const CompareArguments& arguments) {
  if (!arguments.svg.empty()) check_output(arguments.svg);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  require_memory_for(plan);
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n\n", describe_attention(plan.problem(), true).c_str(), plan.kernels().c_str());
  std::fflush(stdout);

  StagedForward forward(plan, file.inputs);
  const Results full(plan);
  std::vector<StageTime> moba_times;
  StageTime dense_time;
  Accuracy accuracy;
  {
    Progress progress;
    moba_times = fastest_forward(forward, arguments.repeat, progress);
    dense_time = fastest_dense(plan, file.inputs, full.outputs, arguments.repeat, progress);
  }
  print_times(moba_times, dense_time, plan.arithmetic(file.starts_q, file.starts_k));
  std::fflush(stdout);

  if (arguments.check_rows > 0) {
    {
      Progress progress;
      accuracy = check_accuracy(plan, file, forward.selection(), forward.outputs().out, full.outputs.out,
                                arguments.check_rows, progress);
    }
    std::printf("\n");
    print_accuracy(accuracy);
  }

  const std::int64_t batch = plan.problem().batch;
  const auto mass_of = [&](std::int64_t first, std::int64_t last) {
    return kept_mass(plan.problem(), file.starts_q, file.starts_k, forward.outputs().lse, full.outputs.lse, first,
                     last);
  };
  std::printf("\n");
  print_kept_mass(mass_of(0, batch));
  if (arguments.svg.empty() || batch == 0) return;
  write_picture(arguments.svg, arguments.input, plan, file, forward.selection(), mass_of(0, 1), 0);
  std::printf("\n%s: the picture%s\n", arguments.svg.c_str(), batch > 1 ? ", of the first sequence" : "");
}

}  // namespace moba::cli
