// moba run and moba dense: tensors in a file to out and lse in a file.
#include <cstdio>

#include "attention_file.h"
#include "commands.h"
#include "describe.h"
#include "memory_use.h"
#include "output_file.h"
#include "safetensors.h"
#include "stages.h"
#include "text.h"

namespace moba::cli {
namespace {

// Writes the results and says what was done.
void finish(const RunArguments& arguments, const AttentionFile& file, const Plan& plan, bool blocks,
            std::vector<StageTime> times, const std::vector<NamedTensor>& results) {
  write_safetensors(arguments.output, results, describe_output(plan.problem(), blocks));
  if (arguments.quiet) return;
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n\n", describe_attention(plan.problem(), blocks).c_str(), plan.kernels().c_str());
  count_flop(times, plan.arithmetic(file.starts_q, file.starts_k));
  print_stage_table(times);
  std::printf("\n%s:", arguments.output.c_str());
  for (std::size_t i = 0; i < results.size(); ++i) {
    std::printf("%s %s %s", i == 0 ? "" : ",", results[i].name.c_str(), describe(results[i].tensor).c_str());
  }
  std::printf("\n");
}

}  // namespace

void run(const RunArguments& arguments) {
  check_output(arguments.output);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const MemoryUse use = memory_use(plan);
  require_memory(use.inputs() + use.staged());
  StagedForward forward(plan, file.inputs);
  std::vector<StageTime> times;
  {
    Progress progress(!arguments.quiet);
    times = forward.run(progress);
  }
  std::vector<NamedTensor> results{{"out", forward.outputs().out}, {"lse", forward.outputs().lse}};
  if (arguments.write_selection) results.push_back({"ids", forward.selection().ids});
  finish(arguments, file, plan, true, times, results);
}

void dense(const RunArguments& arguments) {
  check_output(arguments.output);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const MemoryUse use = memory_use(plan);
  require_memory(use.inputs() + use.dense());
  const Results results(plan);
  std::vector<StageTime> times;
  {
    Progress progress(!arguments.quiet);
    times.push_back(run_dense(plan, file.inputs, results.outputs, progress));
  }
  finish(arguments, file, plan, false, times, {{"out", results.outputs.out}, {"lse", results.outputs.lse}});
}

}  // namespace moba::cli
