// How much of the dense attention lies in the blocks that MoBA chose. For one row that is the sum of the dense softmax
// probabilities of the keys it kept, which is exp(lse of MoBA - lse of dense attention).
#pragma once

#include <cstdint>
#include <vector>

#include "moba/attention.h"
#include "moba/plan.h"

namespace moba::cli {

// Over the rows of one head. A row chooses when it has more blocks in reach than top-k; the others keep everything.
struct KeptMass {
  std::int64_t rows = 0, choosing_rows = 0;
  double mean = 1, choosing_mean = 1, min = 1;  // 1 where there is no row
};

// One entry per query head, over the rows of the sequences [first_sequence, last_sequence). `moba` and `dense` are lse
// [Hq, Tq] of the same inputs. Rows without keys or with an lse that is NaN or
// +inf are left out; one whose keys with any weight were all passed over (the lse of `moba` is -inf) kept 0.
std::vector<KeptMass> kept_mass(const Problem& problem, const std::vector<std::int64_t>& starts_q,
                                const std::vector<std::int64_t>& starts_k, const ConstTensor& moba,
                                const ConstTensor& dense, std::int64_t first_sequence, std::int64_t last_sequence);

// A line per head.
void print_kept_mass(const std::vector<KeptMass>& heads);

}  // namespace moba::cli
