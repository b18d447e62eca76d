// The memory that a problem takes, before anything is allocated.
#pragma once

#include "moba/plan.h"

namespace moba::cli {

// Bytes. All but workspace are tensors of the caller.
struct MemoryUse {
  double q = 0, k = 0, v = 0, out = 0, lse = 0;
  double workspace = 0;  // all that a call takes beyond its tensors
  double stages =
      0;  // tensors between the stages, for who calls them one by one: rotated q and k, centroids, selection
};

MemoryUse memory_use(const Plan& plan);

// Refuses (moba::Error) what this machine has no memory for: `bytes` are about to be allocated.
void require_memory(double bytes);

// The same for the tensors of a plan, with those that the stages make one by one.
void require_memory_for(const Plan& plan);

}  // namespace moba::cli
