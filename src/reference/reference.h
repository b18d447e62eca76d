// What the reference computes before it rounds, for tests that compare against float64.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"

namespace moba::reference {

// Gate scores q . centroid of query `token` (of the packed batch) and query head `head` with the first `blocks` blocks
// of `sequence`, which the token belongs to.
std::vector<double> scores(const Call& call, const ConstTensor& centroids, const Sequence& sequence, std::int64_t token,
                           std::int64_t head, std::int64_t blocks);

// attend() and dense() without the rounding.
struct Rows {
  std::vector<double> out;  // [Tq, Hq, d]
  std::vector<double> lse;  // [Hq, Tq]
};
Rows attend_f64(const Call& call, const Selection& selection);
Rows dense_f64(const Call& call);

}  // namespace moba::reference
