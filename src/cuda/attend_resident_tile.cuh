// A tile of 64 rows between and behind the two products of attend_resident_sm90.cu, in registers. Warp w of the four
// has rows 16w to 16w + 15. Its lane 4r + c has the columns 8j + 2c and + 1 of two rows: of row r in x[4j], x[4j + 1],
// with a 0 in the names below, and of row r + 8 in x[4j + 2], x[4j + 3], with a 1. Scores S [64, keys] are keys / 2
// such floats, weights the same columns as pairs of 16 bits, keys / 4 words, outputs O [64, d] d / 2 floats.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/lanes.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::resident {

inline constexpr int kStepsInPiece = 2;  // of P V, 16 keys each, between the exponentials

// Rows r and r + 8 of a lane see visible0 and visible1 keys.
template <int n>
__device__ __forceinline__ void mask(float (&s)[n], int visible0, int visible1) {
  const int column = threadIdx.x % 4 * 2;
  visible0 -= column, visible1 -= column;
#pragma unroll
  for (int j = 0; j < n / 4; ++j) {
    if (8 * j >= visible0) s[4 * j] = -INFINITY;
    if (8 * j + 1 >= visible0) s[4 * j + 1] = -INFINITY;
    if (8 * j >= visible1) s[4 * j + 2] = -INFINITY;
    if (8 * j + 1 >= visible1) s[4 * j + 3] = -INFINITY;
  }
}

// The greatest score of each of the two rows, at least -FLT_MAX: scores of -inf less it are -inf, less -inf they were
// NaN. NaN is passed over here, and found again by the exponentials.
template <int n>
__device__ __forceinline__ void row_maxima(const float (&s)[n], float& max0, float& max1) {
  float even0 = s[0], odd0 = s[1], even1 = s[2], odd1 = s[3];
#pragma unroll
  for (int j = 4; j < n; j += 4) {
    even0 = fmaxf(even0, s[j]), odd0 = fmaxf(odd0, s[j + 1]);
    even1 = fmaxf(even1, s[j + 2]), odd1 = fmaxf(odd1, s[j + 3]);
  }
  max0 = fmaxf(quad_max(fmaxf(even0, odd0)), -FLT_MAX), max1 = fmaxf(quad_max(fmaxf(even1, odd1)), -FLT_MAX);
}

// s -> exp2(factor s - offset) for the scores of the piece from s[begin] on, packed, and added to the sums.
template <class T, int n>
__device__ __forceinline__ void exponentials(float (&s)[n], std::uint32_t (&weights)[n / 2], int begin, float factor,
                                             float offset0, float offset1, float& sum0, float& sum1) {
  float even0, odd0, even1, odd1;
#pragma unroll
  for (int i = 0; i < 8 * kStepsInPiece; i += 4) {
    const int j = begin + i;
    s[j] = ptx::exp2_approx(s[j] * factor - offset0), s[j + 1] = ptx::exp2_approx(s[j + 1] * factor - offset0);
    s[j + 2] = ptx::exp2_approx(s[j + 2] * factor - offset1), s[j + 3] = ptx::exp2_approx(s[j + 3] * factor - offset1);
    even0 = i == 0 ? s[j] : even0 + s[j], odd0 = i == 0 ? s[j + 1] : odd0 + s[j + 1];
    even1 = i == 0 ? s[j + 2] : even1 + s[j + 2], odd1 = i == 0 ? s[j + 3] : odd1 + s[j + 3];
    weights[j / 2] = ptx::pack<T>(s[j], s[j + 1]), weights[j / 2 + 1] = ptx::pack<T>(s[j + 2], s[j + 3]);
  }
  sum0 += even0 + odd0, sum1 += even1 + odd1;
}

// Makes scores relative to their maxima, for where factor * max is so large that its rounding is not small next to 1.
template <int n>
__device__ __forceinline__ void subtract(float (&s)[n], float max0, float max1) {
#pragma unroll
  for (int j = 0; j < n; j += 4) s[j] -= max0, s[j + 1] -= max0, s[j + 2] -= max1, s[j + 3] -= max1;
}

// A row without a key has the sum 0: its output is 0, whatever V held.
template <int n>
__device__ __forceinline__ void clear_empty(float (&out)[n], float& sum0, float& sum1) {
#pragma unroll
  for (int j = 0; j < n; j += 4) {
    if (sum0 == 0) out[j] = out[j + 1] = 0;
    if (sum1 == 0) out[j + 2] = out[j + 3] = 0;
  }
  if (sum0 == 0) sum0 = 1;
  if (sum1 == 0) sum1 = 1;
}

// out = weights V over the first end0 (row r) or end1 (r + 8) keys, in plain arithmetic: a weight of 0 does not keep a
// NaN or an infinity behind the causal mask out of the product. Where `end` is 0, the lane's part of the row stays as
// it is; all lanes take part all the same. V's operand has kRows rows.
template <class T, int d, int kKeys, int kRows>
__device__ __forceinline__ void multiply_visible(float (&out)[d / 2], const std::uint32_t (&weights)[kKeys / 4],
                                                 const char* v, int end0, int end1) {
  std::uint32_t words[kKeys / 4];  // in local memory, to be indexed
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) words[i] = weights[i];
#pragma unroll
  for (int i = 0; i < d / 2; i += 4) {
    if (end0 > 0) out[i] = out[i + 1] = 0;
    if (end1 > 0) out[i + 2] = out[i + 3] = 0;
  }
#pragma unroll 1
  for (int key = 0; key < kKeys; ++key) {
    const int word = key / 8 * 2, lane = (threadIdx.x & 28) + key % 8 / 2;
    const float2 pair0 = ptx::unpack<T>(__shfl_sync(kAllLanes, words[word], lane));
    const float2 pair1 = ptx::unpack<T>(__shfl_sync(kAllLanes, words[word + 1], lane));
    const float weight0 = key % 2 == 0 ? pair0.x : pair0.y, weight1 = key % 2 == 0 ? pair1.x : pair1.y;
#pragma unroll
    for (int j = 0; j < d / 8; ++j) {
      const char* at = v + swizzled_band(kRows, key, j) + threadIdx.x % 4 * 4;
      const float2 value = ptx::unpack<T>(*reinterpret_cast<const std::uint32_t*>(at));
      if (key < end0) out[4 * j] += weight0 * value.x, out[4 * j + 1] += weight0 * value.y;
      if (key < end1) out[4 * j + 2] += weight1 * value.x, out[4 * j + 3] += weight1 * value.y;
    }
  }
}

// Whether the lane's parts of its two rows hold an infinity or a NaN.
template <int n>
__device__ __forceinline__ void find_not_finite(const float (&x)[n], bool& in0, bool& in1) {
  float sum0 = 0, sum1 = 0;
#pragma unroll
  for (int j = 0; j < n; j += 4) {
    sum0 += 0 * x[j], sum0 += 0 * x[j + 1];
    sum1 += 0 * x[j + 2], sum1 += 0 * x[j + 3];
  }
  in0 = sum0 != 0, in1 = sum1 != 0;
}

// A lane's part of row `half` * 8 + r: the chunks 4m + c, 64 bytes side by side from the four lanes of a row.
template <class T, int half, int n>
__device__ __forceinline__ void store_row(char* to, const float (&out)[n], float factor) {
  const auto word = [&](int i) { return ptx::pack<T>(out[i + 2 * half] * factor, out[i + 2 * half + 1] * factor); };
#pragma unroll
  for (int m = 0; m < n / 16; ++m) {
    __stcs(reinterpret_cast<uint4*>(to + m * 64),
           make_uint4(word(16 * m), word(16 * m + 4), word(16 * m + 8), word(16 * m + 12)));
  }
}

}  // namespace moba::cuda::resident
