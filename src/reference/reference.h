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

// backward() and dense_backward() without the rounding, and from results that need not be rounded either: gradients of
// sum(dout * out), dout [Tq, Hq, d]. As those, they turn dq and dk back where the plan has a rope.
struct GradientRows {
  std::vector<double> dq;      // [Tq, Hq, d]
  std::vector<double> dk, dv;  // [Tk, Hk, d]
};
GradientRows backward_f64(const Call& call, const Selection& selection, const Rows& results,
                          const std::vector<double>& dout);
GradientRows dense_backward_f64(const Call& call, const Rows& results, const std::vector<double>& dout);

}  // namespace moba::reference
