// Causal masks of units (Unit in contract.h, or what a kernel makes of it), in attend and backward.
#pragma once

#include <cstdint>

#include "cuda/contract.h"
#include "cuda/divide.cuh"

namespace moba::cuda {

// Keys of the unit that a masked row of query token `token` sees.
template <class AnyUnit>
__device__ __forceinline__ int keys_up_to(const AnyUnit& unit, int token) {
  return min(unit.keys, max(0, token - unit.first_token + 1));
}

// Keys of the unit that row `i` of it sees.
template <class AnyUnit>
__device__ __forceinline__ int visible_keys(const AnyUnit& unit, int i, const std::int32_t* rows,
                                            const Divide& by_group) {
  if (i >= unit.masked) return unit.keys;
  return keys_up_to(unit, by_group(unit.row0 >= 0 ? unit.row0 + i : rows[unit.first + i]));
}

}  // namespace moba::cuda
