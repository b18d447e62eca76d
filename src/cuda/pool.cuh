// Sums of keys, 8 columns (16 bytes) at a time, as docs/spec.md section 4 orders them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/math.cuh"

namespace moba::cuda {

inline constexpr int kPoolGroup = 64;  // keys that are added up before their sum is

// The sum of nothing: -0, so that the first value added stands as it is, -0 too.
__device__ __forceinline__ void clear(float (&sum)[8]) {
#pragma unroll
  for (float& s : sum) s = -0.0f;
}

template <class T>
__device__ __forceinline__ void add(float (&sum)[8], const uint4& chunk) {
  const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::unpack<T>(words[i]);
    sum[2 * i] += pair.x;
    sum[2 * i + 1] += pair.y;
  }
}

__device__ __forceinline__ void add(float (&sum)[8], const float4& low, const float4& high) {
  sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
  sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
}

template <class T>
__device__ __forceinline__ uint4 mean(const float (&sum)[8], int keys) {
  const float count = static_cast<float>(keys);
  return make_uint4(ptx::pack<T>(__fdiv_rn(sum[0], count), __fdiv_rn(sum[1], count)),
                    ptx::pack<T>(__fdiv_rn(sum[2], count), __fdiv_rn(sum[3], count)),
                    ptx::pack<T>(__fdiv_rn(sum[4], count), __fdiv_rn(sum[5], count)),
                    ptx::pack<T>(__fdiv_rn(sum[6], count), __fdiv_rn(sum[7], count)));
}

}  // namespace moba::cuda
