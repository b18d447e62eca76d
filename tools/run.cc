// moba run and moba dense: tensors in a file to out and lse in a file.
#include <cmath>
#include <cstdio>

#include "attention_file.h"
#include "commands.h"
#include "describe.h"
#include "memory_use.h"
#include "numeric.h"
#include "output_file.h"
#include "safetensors.h"
#include "stages.h"
#include "text.h"

namespace moba::cli {
namespace {

// Rows of out [Tq, Hq, d] that hold an inf or a NaN.
std::int64_t rows_not_finite(const ConstTensor& out) {
  const std::int64_t rows = out.shape[0] * out.shape[1], d = out.shape[2];
  std::int64_t bad = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    bool finite = true;
    for (std::int64_t i = row * d; i < (row + 1) * d; ++i) finite &= std::isfinite(load_float(out.data, out.dtype, i));
    bad += finite ? 0 : 1;
  }
  return bad;
}

// Writes the results and says what was done.
void finish(const RunArguments& arguments, const AttentionFile& file, const Plan& plan, bool blocks,
            std::vector<StageTime> times, const std::vector<NamedTensor>& results) {
  write_safetensors(arguments.output, results, describe_output(plan.problem(), blocks));
  if (arguments.quiet) return;
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n\n", describe_attention(plan.problem(), blocks).c_str(), plan.kernels().c_str());
  count_flop(times, plan.arithmetic(file.starts_q, file.starts_k));
  print_stage_table(times, RateUnit(plan));
  std::printf("\n%s: %s\n", arguments.output.c_str(), list(results).c_str());
  const ConstTensor& out = results.front().tensor;
  if (const std::int64_t bad = rows_not_finite(out); bad > 0) {
    std::printf("%s of %s rows of out are not finite\n", std::to_string(bad).c_str(),
                std::to_string(out.shape[0] * out.shape[1]).c_str());
  }
}

}  // namespace

void run(const RunArguments& arguments) {
  check_output(arguments.output, arguments.input);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const MemoryUse use = memory_use(plan);
  require_memory(plan, {use.inputs(), use.staged(), use.results() + use.ids});
  const PlacedInputs placed(plan, file.inputs);
  StagedForward forward(plan, placed.inputs());
  std::vector<StageTime> times;
  {
    Progress progress(!arguments.quiet);
    for (int pass = 0; pass <= warm_ups(plan); ++pass) times = forward.run(progress);
  }
  const OnHost out(forward.outputs().out), lse(forward.outputs().lse), ids(forward.selection().ids);
  std::vector<NamedTensor> results{{"out", out.tensor()}, {"lse", lse.tensor()}};
  if (arguments.write_selection) results.push_back({"ids", ids.tensor()});
  finish(arguments, file, plan, true, times, results);
}

void dense(const RunArguments& arguments) {
  check_output(arguments.output, arguments.input);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const MemoryUse use = memory_use(plan);
  require_memory(plan, {use.inputs(), use.dense(), use.results()});
  const PlacedInputs placed(plan, file.inputs);
  const PlacedMemory workspace(Place(plan), plan.workspace_bytes(), "the workspace");
  const Results results(plan);
  std::vector<StageTime> times;
  {
    Progress progress(!arguments.quiet);
    for (int pass = 0; pass <= warm_ups(plan); ++pass) {
      times = {run_dense(plan, placed.inputs(), results.outputs, workspace.span(), progress)};
    }
  }
  const OnHost out(results.outputs.out), lse(results.outputs.lse);
  finish(arguments, file, plan, false, times, {{"out", out.tensor()}, {"lse", lse.tensor()}});
}

}  // namespace moba::cli
