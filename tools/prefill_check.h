// What came out of a cache held against one prefill of the same tokens.
#pragma once

#include <cstdint>

#include "moba/attention.h"
#include "moba/plan.h"
#include "replay.h"
#include "stages.h"

namespace moba::cli {

struct PrefillCheck {
  std::int64_t rows = 0;      // tokens x heads
  std::int64_t same_ids = 0;  // rows for which both chose the same blocks
  double error = 0;           // the largest |out - prefill| / |prefill| (Euclidean) of a row; infinite where one is not
                              // finite
  double allowed = 0;         // what rounding may come to
  std::int64_t not_finite = 0;  // rows with elements that are not finite in both, which are left out

  bool passed() const { return same_ids == rows && error <= allowed; }
};

// `forward` holds the prefill.
PrefillCheck check_against_prefill(const Plan& plan, const StagedForward& forward, const Replayed& replayed);

}  // namespace moba::cli
