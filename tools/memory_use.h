// The memory that a problem takes, before anything is allocated.
#pragma once

#include "moba/plan.h"

namespace moba::cli {

// Bytes. All but workspace are tensors of the caller.
struct MemoryUse {
  double q = 0, k = 0, v = 0, out = 0, lse = 0;
  double workspace = 0;  // all that a call takes beyond its tensors
  double stages = 0;     // between the stages, for who calls them one by one: rotated q and k, centroids, selection

  double inputs() const { return q + k + v; }
  // What the types of stages.h take beside the inputs: full attention with its Results, and a StagedForward.
  double dense() const { return out + lse + workspace; }
  double staged() const { return dense() + stages; }
};

MemoryUse memory_use(const Plan& plan);

// Refuses (moba::Error) to allocate more bytes than memory_bytes() (machine.h) allows this process in all.
void require_memory(double bytes);

}  // namespace moba::cli
