// moba map: the selection as a picture.
#include <cstdio>

#include "attention_file.h"
#include "commands.h"
#include "kept_mass.h"
#include "memory_use.h"
#include "output_file.h"
#include "picture.h"
#include "stages.h"

namespace moba::cli {

void map(const MapArguments& arguments) {
  check_output(arguments.output, arguments.input);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  file.check_sequence(arguments.sequence);
  const MemoryUse use = memory_use(plan);
  require_memory(plan, {use.inputs(), use.staged() + use.results(), use.ids + 2 * use.lse});
  const PlacedInputs placed(plan, file.inputs);
  StagedForward forward(plan, placed.inputs());
  const Results full(plan);
  {
    Progress progress;
    forward.run(progress);
    run_dense(plan, placed.inputs(), full.outputs, forward.workspace(), progress);
  }
  const OnHost ids(forward.selection().ids), lse(forward.outputs().lse), dense_lse(full.outputs.lse);
  const std::vector<KeptMass> mass = kept_mass(plan.problem(), file.starts_q, file.starts_k, lse.tensor(),
                                               dense_lse.tensor(), arguments.sequence, arguments.sequence + 1);
  write_picture(arguments.output, arguments.input, plan, file, ids.tensor(), mass, arguments.sequence);
  print_kept_mass(mass);
  std::printf("\n%s: the picture\n", arguments.output.c_str());
}

}  // namespace moba::cli
