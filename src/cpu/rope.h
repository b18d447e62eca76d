// The end of backward: float32 sums to gradients of the plan's dtype, turned back where rope had turned q and k.
#pragma once

#include "cpu/workers.h"

namespace moba::cpu {

// to = factor * from turned back by the positions of its tokens, `position` and the following ones; both [tokens,
// heads, d], `from` float32. In float64, rounded once to float32 and to the dtype, as rope itself.
void turn_back(const Call& call, const ConstTensor& from, const Tensor& to, std::int64_t position, float factor,
               const RopeScratch& scratch);

// to = factor * from, rounded.
void round_rows(const Call& call, const ConstTensor& from, const Tensor& to, float factor);

}  // namespace moba::cpu
