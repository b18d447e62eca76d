// moba plan: what a problem takes, before anything runs.
#include "moba/plan.h"

#include <cstdio>

#include "commands.h"
#include "memory_use.h"
#include "problem_text.h"
#include "text.h"

namespace moba::cli {
namespace {

void print_memory(const Plan& plan) {
  const MemoryUse use = memory_use(plan);
  const auto line = [](const char* name, double bytes, const char* remark) {
    std::printf("  %-10s %11s%s%s\n", name, format_bytes(bytes).c_str(), *remark ? "   " : "", remark);
  };
  std::printf("memory\n");
  line("q", use.q, "");
  line("k and v", use.k + use.v, "");
  line("out", use.out, "");
  line("lse", use.lse, "");
  line("workspace", use.workspace, "all that a call takes beyond the tensors above");
  line("total", use.q + use.k + use.v + use.out + use.lse + use.workspace, "");
  line("selection", use.selection,
       "for backward, and who calls the stages one by one; otherwise in the workspace, part by part if need be");
  if (use.kept_selection < use.selection) line("ids", use.kept_selection, "of the selection, all that backward needs");
  const std::size_t limit = plan.options().workspace_limit;
  line("backward", use.backward_workspace,
       limit > 0 && plan.backward_workspace_bytes() > limit
           ? "workspace of backward: more than the limit, so backward is refused"
           : "workspace of backward, beyond selection, dout and gradients");
}

void print_arithmetic(const Arithmetic& arithmetic) {
  const double moba = arithmetic.pool + arithmetic.gate + arithmetic.attend;
  std::printf("arithmetic\n");
  for (const auto& [name, flop] :
       {std::pair{"pool", arithmetic.pool}, std::pair{"gate", arithmetic.gate}, std::pair{"attend", arithmetic.attend},
        std::pair{"MoBA", moba}, std::pair{"dense", arithmetic.dense}, std::pair{"backward", arithmetic.backward},
        std::pair{"of dense", arithmetic.dense_backward}}) {
    std::printf("  %-10s %14s\n", name, format_flop(flop).c_str());
  }
  if (moba > 0) std::printf("dense / MoBA %.2f\n", arithmetic.dense / moba);
}

}  // namespace

void plan(const PlanArguments& arguments) {
  const TextProblem problem = parse_problem(arguments.problem, arguments.options);
  const Plan plan(problem.problem, problem.options);
  const std::int64_t batch = problem.problem.batch;
  std::printf("problem  %s\nkernels  %s\n\n", describe(problem).c_str(), plan.kernels().c_str());
  print_memory(plan);
  std::printf("\n");
  print_arithmetic(plan.arithmetic(start_offsets(batch, problem.seqlen_q), start_offsets(batch, problem.seqlen_k)));
}

}  // namespace moba::cli
