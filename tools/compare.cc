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

template <class Function>
double fastest(int repeat, Function&& function) {
  double best = function().seconds;
  for (int i = 1; i < repeat; ++i) best = std::min(best, function().seconds);
  return best;
}

void print_time(const char* name, double seconds, double flop, const RateUnit& unit) {
  std::printf("%-8s %12s %20.1f\n", name, format_seconds(seconds).c_str(),
              seconds > 0 ? flop / seconds / unit.flops : 0.0);
}

// What MoBA and full attention computed, where the host can read it, as long as they are there.
struct Computed {
  Computed(const StagedForward& forward, const Results& full)
      : ids(forward.selection().ids),
        out(forward.outputs().out),
        lse(forward.outputs().lse),
        dense_out(full.outputs.out),
        dense_lse(full.outputs.lse) {}

  OnHost ids, out, lse, dense_out, dense_lse;
};

// Times both, leaving their results behind, and prints the table. Where the whole is timed beside its stages its
// results are the ones that stay, so that what is held against float64 later is what forward() gives.
void compare_times(const CompareArguments& arguments, const AttentionFile& file, const Plan& plan, const Inputs& inputs,
                   StagedForward& forward, const Results& full) {
  std::vector<StageTime> moba;
  double whole = 0, dense = 0;
  {
    Progress progress;
    const int passes = warm_ups(plan) + arguments.repeat;
    moba = fastest_pass(passes, [&] { return forward.run(progress); });
    whole = whole_differs(plan) ? fastest(passes, [&] { return forward.run_whole(progress); }) : total_seconds(moba);
    dense = fastest(passes, [&] { return run_dense(plan, inputs, full.outputs, forward.workspace(), progress); });
  }
  const Arithmetic arithmetic = plan.arithmetic(file.starts_q, file.starts_k);
  const double flop = arithmetic.pool + arithmetic.gate + arithmetic.attend;
  const RateUnit unit(plan);
  count_flop(moba, arithmetic);
  print_stage_table(moba, unit);
  if (whole_differs(plan)) print_time("forward", whole, flop, unit);
  print_time("dense", dense, arithmetic.dense, unit);
  if (whole_differs(plan)) std::printf("%s\n", kWholeDiffers);
  std::printf("\nspeed-up over dense: %.2f in time, %.2f in arithmetic\n", dense / whole,
              flop > 0 ? arithmetic.dense / flop : 1.0);
}

void compare_with_float64(const CompareArguments& arguments, const AttentionFile& file, const Plan& plan,
                          const Computed& computed) {
  Accuracy accuracy;
  {
    Progress progress;
    accuracy = check_accuracy(plan, file, computed.ids.tensor(), computed.out.tensor(), computed.dense_out.tensor(),
                              arguments.check_rows, progress);
  }
  const std::string rows = std::to_string(accuracy.rows), same = std::to_string(accuracy.same_selection);
  const char* which = accuracy.tokens == plan.problem().total_q ? "all" : "the last";
  std::printf("\nerror against float64, relative per row, over %s %s query tokens (%s rows)\n", which,
              std::to_string(accuracy.tokens).c_str(), rows.c_str());
  std::printf("%-8s %12s %12s\n", "", "max", "median");
  std::printf("%-8s %s\n%-8s %s\n", "MoBA", columns(accuracy.moba).c_str(), "dense", columns(accuracy.dense).c_str());
  std::printf("same blocks as float64 in %s of %s rows\n", same.c_str(), rows.c_str());
}

// The kept mass of all sequences, and the picture of the first.
void compare_mass(const CompareArguments& arguments, const AttentionFile& file, const Plan& plan,
                  const Computed& computed) {
  const std::int64_t batch = plan.problem().batch;
  const auto mass_of = [&](std::int64_t first, std::int64_t last) {
    return kept_mass(plan.problem(), file.starts_q, file.starts_k, computed.lse.tensor(), computed.dense_lse.tensor(),
                     first, last);
  };
  std::printf("\n");
  print_kept_mass(mass_of(0, batch));
  if (arguments.svg.empty()) return;
  if (batch == 0) throw Error("--svg: the file holds no sequence to draw");
  write_picture(arguments.svg, arguments.input, plan, file, computed.ids.tensor(), mass_of(0, 1), 0);
  std::printf("\n%s: the picture%s\n", arguments.svg.c_str(), batch > 1 ? " of the first sequence" : "");
}

}  // namespace

void compare(const CompareArguments& arguments) {
  if (!arguments.svg.empty()) check_output(arguments.svg, arguments.input);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const MemoryUse use = memory_use(plan);
  const double checks = arguments.check_rows > 0 ? accuracy_bytes(plan, arguments.check_rows) : 0;
  require_memory(plan, {use.inputs(), use.staged() + use.results(), 2 * use.results() + use.ids, checks});
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n\n", describe_attention(plan.problem(), true).c_str(), plan.kernels().c_str());
  std::fflush(stdout);  // what follows can take a while

  const PlacedInputs placed(plan, file.inputs);
  StagedForward forward(plan, placed.inputs());
  const Results full(plan);
  compare_times(arguments, file, plan, placed.inputs(), forward, full);
  const Computed computed(forward, full);
  std::fflush(stdout);
  if (arguments.check_rows > 0) compare_with_float64(arguments, file, plan, computed);
  compare_mass(arguments, file, plan, computed);
}

}  // namespace moba::cli
