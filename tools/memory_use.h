// The memory that a problem takes, before anything is allocated.
#pragma once

#include "moba/plan.h"

namespace moba::cli {

// Bytes. All but workspace are tensors of the caller.
struct MemoryUse {
  double q = 0, k = 0, v = 0, out = 0, lse = 0;
  double workspace = 0;           // all that a call takes beyond its tensors
  double backward_workspace = 0;  // the same of backward
  double ids = 0;                 // the chosen blocks, of the selection
  double selection = 0;           // whole: the ids and their transpose
  double kept_selection = 0;      // what backward needs of it: on a GPU the ids
  double stages = 0;  // between the stages, for who calls them one by one: rotated q and k, centroids, selection

  double inputs() const { return q + k + v; }
  double results() const { return out + lse; }
  // What the types of stages.h take beside the inputs: full attention with its Results, and a StagedForward.
  double dense() const { return results() + workspace; }
  double staged() const { return dense() + stages; }
  // dq, dk and dv.
  double gradients() const { return inputs(); }
  // What a forward that keeps its selection and backward after it take beside the inputs and dout.
  double trained() const {
    return results() + kept_selection + gradients() + (workspace > backward_workspace ? workspace : backward_workspace);
  }
};

MemoryUse memory_use(const Plan& plan);

// Whether backward needs no more of a selection than its ids.
bool needs_ids_alone(const Plan& plan);

// What a command takes, in bytes.
struct Demand {
  double inputs = 0;     // on the host and, if that is a GPU, where the plan computes
  double computing = 0;  // where the plan computes
  double read = 0;       // of that, what is copied to the host from a GPU
  double host = 0;       // on the host, beside all that
};

// Refuses (moba::Error) a command that takes more memory than the host or the GPU has.
void require_memory(const Plan& plan, const Demand& demand);

// Refuses (moba::Error) to allocate more bytes than memory_bytes() (machine.h) allows this process in all.
void require_memory(double bytes);

}  // namespace moba::cli
