// moba compare: MoBA against full attention and against float64, on the tensors of a file.
#include <algorithm>
#include <cstdio>

#include "accuracy.h"
#include "attention_file.h"
#include "commands.h"
#include "describe.h"
#include "kept_mass.h"
#include "memory_use.h"
#include "moba/error.h"
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

// Times both, leaving their results behind, and prints the table.
void compare_times(const CompareArguments& arguments, const AttentionFile& file, const Plan& plan,
                   StagedForward& forward, const Results& full) {
  std::vector<StageTime> moba;
  StageTime dense;
  {
    Progress progress;
    moba = fastest_forward(forward, arguments.repeat, progress);
    dense = fastest_dense(plan, file.inputs, full.outputs, arguments.repeat, progress);
  }
  const Arithmetic arithmetic = plan.arithmetic(file.starts_q, file.starts_k);
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
  if (errors.not_finite > 0) std::printf("   and %s rows not finite", std::to_string(errors.not_finite).c_str());
  std::printf("\n");
}

void compare_with_float64(const CompareArguments& arguments, const AttentionFile& file, const Plan& plan,
                          const StagedForward& forward, const Results& full) {
  Accuracy accuracy;
  {
    Progress progress;
    accuracy = check_accuracy(plan, file, forward.selection(), forward.outputs().out, full.outputs.out,
                              arguments.check_rows, progress);
  }
  const std::string rows = std::to_string(accuracy.rows), same = std::to_string(accuracy.same_selection);
  const char* which = accuracy.tokens == plan.problem().total_q ? "all" : "the last";
  std::printf("\nerror against float64, relative per row, over %s %s query tokens (%s rows)\n", which,
              std::to_string(accuracy.tokens).c_str(), rows.c_str());
  std::printf("%-8s %12s %12s\n", "", "max", "median");
  print_errors("MoBA", accuracy.moba);
  print_errors("dense", accuracy.dense);
  std::printf("same blocks as float64 in %s of %s rows\n", same.c_str(), rows.c_str());
}

// The kept mass of all sequences, and the picture of the first.
void compare_mass(const CompareArguments& arguments, const AttentionFile& file, const Plan& plan,
                  const StagedForward& forward, const Results& full) {
  const std::int64_t batch = plan.problem().batch;
  const auto mass_of = [&](std::int64_t first, std::int64_t last) {
    return kept_mass(plan.problem(), file.starts_q, file.starts_k, forward.outputs().lse, full.outputs.lse, first,
                     last);
  };
  std::printf("\n");
  print_kept_mass(mass_of(0, batch));
  if (arguments.svg.empty()) return;
  if (batch == 0) throw Error("--svg: the file holds no sequence to draw");
  write_picture(arguments.svg, arguments.input, plan, file, forward.selection(), mass_of(0, 1), 0);
  std::printf("\n%s: the picture%s\n", arguments.svg.c_str(), batch > 1 ? " of the first sequence" : "");
}

}  // namespace

void compare(const CompareArguments& arguments) {
  if (!arguments.svg.empty()) check_output(arguments.svg, arguments.input);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const MemoryUse use = memory_use(plan);
  const double checks = arguments.check_rows > 0 ? accuracy_bytes(plan, arguments.check_rows) : 0;
  // The workspace of full attention is free again when the checks begin.
  require_memory(use.inputs() + use.staged() + use.out + use.lse + std::max(use.workspace, checks));
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n\n", describe_attention(plan.problem(), true).c_str(), plan.kernels().c_str());
  std::fflush(stdout);  // what follows can take a while

  StagedForward forward(plan, file.inputs);
  const Results full(plan);
  compare_times(arguments, file, plan, forward, full);
  std::fflush(stdout);
  if (arguments.check_rows > 0) compare_with_float64(arguments, file, plan, forward, full);
  compare_mass(arguments, file, plan, forward, full);
}

}  // namespace moba::cli
