// Prefix sums over a CTA.
#pragma once

#include <cuda_runtime.h>

#include "cuda/lanes.cuh"

namespace moba::cuda {

// Sum of `value` over the lanes before this one (exclusive); `total` (may be null) gets the sum over the warp.
template <class T>
__device__ __forceinline__ T scan_warp(T value, T* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (total != nullptr) *total = __shfl_sync(kAllLanes, inclusive, 31);
  return inclusive - value;
}

inline constexpr int kScanScratch = 33;

// The same over a CTA of kWarps warps, all threads of which call; `scratch` [kScanScratch] may be used again at once.
template <int kWarps = 32, class T>
__device__ __forceinline__ T scan_block(T value, T* scratch, T* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T warp_total;
  const T before = scan_warp(value, &warp_total);
  if (lane == 0) scratch[warp] = warp_total;
  __syncthreads();
  if (warp == 0) {
    T all;
    const T warps_before = scan_warp(lane < kWarps ? scratch[lane] : T{}, &all);
    __syncwarp();
    scratch[lane] = warps_before;
    if (lane == 0) scratch[32] = all;
  }
  __syncthreads();
  *total = scratch[32];
  const T result = scratch[warp] + before;
  __syncthreads();
  return result;
}

}  // namespace moba::cuda
