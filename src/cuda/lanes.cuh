// What lanes of a warp exchange. A quad is four lanes from a multiple of four on: matrix products keep a row in one.
#pragma once

#include <cstdint>

namespace moba::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// 4x4 transpose: lane c gives word m to lane m as that lane's word c. `lane` counts in the quad, the warp or the CTA.
__device__ __forceinline__ void quad_transpose(std::uint32_t (&words)[4], int lane) {
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
  const std::uint32_t x = __shfl_xor_sync(kAllLanes, odd ? words[0] : words[1], 1);
  const std::uint32_t y = __shfl_xor_sync(kAllLanes, odd ? words[2] : words[3], 1);
  (odd ? words[0] : words[1]) = x;  // words[odd ? 0 : 1] would put the array into local memory
  (odd ? words[2] : words[3]) = y;
  const std::uint32_t z = __shfl_xor_sync(kAllLanes, upper ? words[0] : words[2], 2);
  const std::uint32_t w = __shfl_xor_sync(kAllLanes, upper ? words[1] : words[3], 2);
  (upper ? words[0] : words[2]) = z;
  (upper ? words[1] : words[3]) = w;
}

}  // namespace moba::cuda
