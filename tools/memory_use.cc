#include "memory_use.h"

#include "device.h"
#include "machine.h"
#include "moba/error.h"
#include "text.h"

namespace moba::cli {

MemoryUse memory_use(const Plan& plan) {
  const Problem& problem = plan.problem();
  const auto element = static_cast<double>(size_in_bytes(problem.dtype));
  const auto d = static_cast<double>(problem.head_dim);
  const double q_rows = static_cast<double>(problem.total_q) * static_cast<double>(problem.q_heads);
  const double k_rows = static_cast<double>(problem.total_k) * static_cast<double>(problem.kv_heads);
  const double centroids = static_cast<double>(plan.max_blocks()) * static_cast<double>(problem.kv_heads) * d * element;

  MemoryUse use;
  use.q = use.out = q_rows * d * element;
  use.k = use.v = k_rows * d * element;
  use.lse = q_rows * sizeof(float);
  use.ids = static_cast<double>(plan.ids_bytes());
  use.workspace = static_cast<double>(plan.workspace_bytes());
  use.backward_workspace = static_cast<double>(plan.backward_workspace_bytes());
  use.selection = static_cast<double>(plan.selection_bytes());
  use.kept_selection = needs_ids_alone(plan) ? use.ids : use.selection;
  use.stages = use.selection + centroids + (problem.rope ? use.q + use.k : 0.0);
  return use;
}

bool needs_ids_alone(const Plan& plan) { return plan.options().backend == Backend::cuda; }

void require_memory(const Plan& plan, const Demand& demand) {
  if (plan.options().backend != Backend::cuda) return require_memory(demand.inputs + demand.computing + demand.host);
  require_memory(demand.inputs + demand.read + demand.host);
  require_gpu_memory(plan, demand.inputs + demand.computing);
}

void require_memory(double bytes) {
  if (bytes <= memory_bytes()) return;
  throw Error("memory: " + format_bytes(bytes) + " are needed; this process may have " + format_bytes(memory_bytes()) +
              ", the memory of the machine or the limit of its control group");
}

}  // namespace moba::cli
