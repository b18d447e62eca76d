// Prefix sums over a CTA.
#pragma once

#include <cuda_runtime.h>

namespace moba::cuda {

// Sum of `value` over the lanes before this one (exclusive); `total` (may be null) gets the sum over the warp.
__device__ __forceinline__ int scan_warp(int value, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (total != nullptr) *total = __shfl_sync(~0u, inclusive, 31);
  return inclusive - value;
}

inline constexpr int kScanScratch = 33;

// The same over a CTA of 1024 threads (32 warps), all of which call; `scratch` [kScanScratch] may be used again at
// once.
__device__ __forceinline__ int scan_block(int value, int* scratch, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int warp_total;
  const int before = scan_warp(value, &warp_total);
  if (lane == 0) scratch[warp] = warp_total;
  __syncthreads();
  if (warp == 0) {
    int all;
    const int warps_before = scan_warp(scratch[lane], &all);
    __syncwarp();
    scratch[lane] = warps_before;
    if (lane == 0) scratch[32] = all;
  }
  __syncthreads();
  *total = scratch[32];
  const int result = scratch[warp] + before;
  __syncthreads();
  return result;
}

}  // namespace moba::cuda
