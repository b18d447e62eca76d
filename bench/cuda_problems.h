// The problems that the cuda figures are of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_input.h"
#include "moba/plan.h"

namespace moba::bench {

struct CudaProblem {
  std::string name;  // "64k_b512": in the names of its figures
  Problem problem;   // causal; queries and keys have the same lengths
  Options options;
  std::vector<std::int64_t> starts;  // cu_seqlens
  Lean lean_q, lean_k;               // none: every row chooses at random, and all lists are about equally long
  bool target = false;               // has a time to be held (docs/performance.md)
  bool dense = false;                // full attention is timed too
  bool stages = true;                // false: only the whole and the public stages
  std::string ratio_to;              // its time is told as a multiple of this problem's as well
};

std::vector<CudaProblem> cuda_problems();

}  // namespace moba::bench
