// Rotation of pairs by an angle, with the result of float64 arithmetic.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/math.cuh"

namespace moba::cuda {

// x0 c - x1 s or x0 c + x1 s in float64, where the products are exact, then float32.
__device__ __forceinline__ float exact_difference(float x0, float c, float x1, float s) {
  return static_cast<float>(__dsub_rn(__dmul_rn(x0, c), __dmul_rn(x1, s)));
}
__device__ __forceinline__ float exact_sum(float x0, float c, float x1, float s) {
  return static_cast<float>(__dadd_rn(__dmul_rn(x0, c), __dmul_rn(x1, s)));
}

// Bounds of x0 c + x1 s, computed in float32: the product x1 s and the sum round by at most 2^-24 of their size each,
// and so does the bound itself. `safe` is lost where subnormal numbers, infinities or NaN would spoil that.
struct Bounds {
  float low, high;
};
__device__ __forceinline__ Bounds bounds(float x0, float c, float x1, float s, bool& safe) {
  constexpr float kSlack = 0x1.8p-23f, kSmallest = 0x1p-100f;
  const float product = __fmul_rn(x1, s), sum = __fmaf_rn(x0, c, product);
  const float size = __fadd_rn(fabsf(product), fabsf(sum));
  safe = safe && size >= kSmallest;
  return {__fmaf_rn(-kSlack, size, sum), __fmaf_rn(kSlack, size, sum)};
}

// Two chunks of 8 columns, rotated: 8 pairs. half_split: (low[i], high[i]); interleaved: neighbours. The result is that
// of float64 arithmetic rounded to float32 and to T. Where both ends of the float32 bounds round to the same T, that is
// it; float64, with its conversions at an eighth of the rate or less, is left for the rest (one element in 2000, bf16).
template <class T, bool kInterleaved>
__device__ __forceinline__ void rotate(std::uint32_t (&low)[4], std::uint32_t (&high)[4], const float (&c)[8],
                                       const float (&s)[8]) {
  float x0[8], x1[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = ptx::unpack<T>(low[i]), b = ptx::unpack<T>(high[i]);
    if constexpr (kInterleaved) {
      x0[i] = a.x, x1[i] = a.y, x0[4 + i] = b.x, x1[4 + i] = b.y;
    } else {
      x0[2 * i] = a.x, x0[2 * i + 1] = a.y, x1[2 * i] = b.x, x1[2 * i + 1] = b.y;
    }
  }
  bool safe = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int first = kInterleaved ? i : 2 * i, second = kInterleaved ? 4 + i : 2 * i + 1;
    const Bounds y0 = bounds(x0[first], c[first], -x1[first], s[first], safe);
    const Bounds y1 = bounds(x1[first], c[first], x0[first], s[first], safe);
    const Bounds z0 = bounds(x0[second], c[second], -x1[second], s[second], safe);
    const Bounds z1 = bounds(x1[second], c[second], x0[second], s[second], safe);
    const Bounds &low_second = kInterleaved ? y1 : z0, &high_first = kInterleaved ? z0 : y1;
    low[i] = ptx::pack<T>(y0.low, low_second.low);
    high[i] = ptx::pack<T>(high_first.low, z1.low);
    safe =
        safe && low[i] == ptx::pack<T>(y0.high, low_second.high) && high[i] == ptx::pack<T>(high_first.high, z1.high);
  }
  if (safe) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int first = kInterleaved ? i : 2 * i, second = kInterleaved ? 4 + i : 2 * i + 1;
    const float y0 = exact_difference(x0[first], c[first], x1[first], s[first]);
    const float y1 = exact_sum(x1[first], c[first], x0[first], s[first]);
    const float z0 = exact_difference(x0[second], c[second], x1[second], s[second]);
    const float z1 = exact_sum(x1[second], c[second], x0[second], s[second]);
    low[i] = ptx::pack<T>(y0, kInterleaved ? y1 : z0);
    high[i] = ptx::pack<T>(kInterleaved ? z0 : y1, z1);
  }
}

}  // namespace moba::cuda
