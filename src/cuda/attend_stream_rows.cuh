// What a consumer warp of attend_stream_sm90.cu does with its 16 rows between the products: masks, softmax, results.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/attend_stream_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/visible_keys.cuh"

namespace moba::cuda::streaming {

// The lane's two rows of the unit, 8 apart, and what is known of their softmax. The scores of a row are taken relative
// to a reference near their maximum.
struct RowPair {
  int visible[2];  // keys of the unit
  int common;      // the smallest `visible` of the warp
  float reference[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};  // of this lane's columns

  __device__ __forceinline__ RowPair(const Task& task, int place, const Arguments& arguments) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      visible[i] = visible_keys(task, place + 8 * i, arguments.input.rows, arguments.by_group);
    common = task.masked > 0 ? __reduce_min_sync(kAllLanes, min(visible[0], visible[1])) : task.keys;
  }
};

// Scores of keys that the row does not see become -inf; c is the lane's place in its quad.
__device__ __forceinline__ void mask(float (&s)[64], const RowPair& rows, int tile, int c) {
  if ((tile + 1) * kTileKeys <= rows.common) return;
  const int end0 = rows.visible[0] - tile * kTileKeys - 2 * c, end1 = rows.visible[1] - tile * kTileKeys - 2 * c;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (8 * j >= end0) s[4 * j] = -kInfinity;
    if (8 * j + 1 >= end0) s[4 * j + 1] = -kInfinity;
    if (8 * j >= end1) s[4 * j + 2] = -kInfinity;
    if (8 * j + 1 >= end1) s[4 * j + 3] = -kInfinity;
  }
}

// s becomes exp2((s - reference) scale), the weights of the tile. A row's reference follows its maximum only where that
// grew by a factor of 2^8 (weights stay below that, far from the limits of f16 and float): after the first tile of a
// unit that is rare. Returns whether any of the warp's rows did so and earlier sums must be multiplied by `factor`. The
// votes only spare work: what becomes of a row depends on nothing but the row.
__device__ __forceinline__ bool softmax(float (&s)[64], RowPair& rows, float scale, float (&factor)[2]) {
  constexpr float kGrowth = 8.0f;
  // Above this reference times scale rounds by 2^-8 and more: the reference is subtracted before it is multiplied.
  constexpr float kHuge = 65536.0f;
  float top[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float even = s[2 * i], odd = s[2 * i + 1];
#pragma unroll
    for (int j = 4; j < 64; j += 4) even = fmaxf(even, s[j + 2 * i]), odd = fmaxf(odd, s[j + 2 * i + 1]);
    top[i] = quad_max(fmaxf(even, odd));
    factor[i] = 1.0f;
  }
  bool grew[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) grew[i] = (top[i] - rows.reference[i]) * scale > kGrowth;
  const bool changed = __any_sync(kAllLanes, grew[0] || grew[1]);
  float base[2], scaled[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float before = rows.reference[i];
    if (changed) rows.reference[i] = grew[i] ? top[i] : before;
    base[i] = rows.reference[i] == -kInfinity ? 0.0f : rows.reference[i];  // -inf - -inf would be NaN
    scaled[i] = __fmul_rn(base[i], scale);
    if (changed) {  // rounded as the weights were: not contracted to a multiply-add
      const float step = fabsf(scaled[i]) > kHuge ? (before - base[i]) * scale : __fmul_rn(before, scale) - scaled[i];
      factor[i] = grew[i] ? ptx::exp2_approx(step) : 1.0f;
    }
  }
  const bool huge[2] = {fabsf(scaled[0]) > kHuge, fabsf(scaled[1]) > kHuge};
  if (__any_sync(kAllLanes, huge[0] || huge[1])) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      base[i] = huge[i] ? base[i] : 0.0f;
      scaled[i] = huge[i] ? 0.0f : scaled[i];
    }
#pragma unroll
    for (int j = 0; j < 64; ++j) s[j] -= base[j / 2 % 2];
  }
  float sums[4] = {};
#pragma unroll
  for (int j = 0; j < 64; ++j) {
    s[j] = ptx::exp2_approx(fmaf(s[j], scale, -scaled[j / 2 % 2]));
    sums[j % 4] += s[j];
  }
  rows.sum[0] = fmaf(rows.sum[0], factor[0], sums[0] + sums[1]);
  rows.sum[1] = fmaf(rows.sum[1], factor[1], sums[2] + sums[3]);
  return changed;
}

// Adds the non-finite values of a tile, which its product was computed without, to the rows that see them. Any weight
// makes infinity or NaN of them.
template <class T, int d>
__device__ __forceinline__ void add_non_finite(float (&o)[d / 2], const Task& task, int tile, int place, int c,
                                               const Arguments& arguments) {
  const View<const void>& v = arguments.input.v;
  const RowPair rows(task, place, arguments);
  const int begin = tile * kTileKeys, end = min(task.keys, begin + kTileKeys);
  const T* column = static_cast<const T*>(v.data) + task.head * v.head_stride + 2 * c;
#pragma unroll 1
  for (int key = begin; key < end; ++key) {
    const T* values = column + (task.key_begin + key) * v.token_stride;
#pragma unroll
    for (int j = 0; j < d / 2; j += 4) {
      const float2 pair = ptx::unpack<T>(*reinterpret_cast<const std::uint32_t*>(values + 2 * j));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (key < rows.visible[i] && !isfinite(pair.x)) o[j + 2 * i] += pair.x;
        if (key < rows.visible[i] && !isfinite(pair.y)) o[j + 2 * i + 1] += pair.y;
      }
    }
  }
}

// Ends the softmax of a unit: stores the log-sum-exp and gives the factors that normalise the output (0: no key seen).
__device__ __forceinline__ void close_rows(const RowPair& rows, const Task& task, int place, int c,
                                           const Arguments& arguments, float (&factor)[2]) {
  const AttendOutput& output = arguments.output;
  const bool partial = output.partials.out != nullptr;
  const float sums[2] = {quad_sum(rows.sum[0]), quad_sum(rows.sum[1])};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = place + 8 * i;
    factor[i] = sums[i] == 0.0f ? 0.0f : __fdividef(1.0f, sums[i]);
    // The logarithm of no key at all is -inf.
    const float base = rows.reference[i] == -kInfinity ? 0.0f : rows.reference[i] * arguments.scale;
    const float lse = base + ptx::log2_approx(sums[i]);
    if (c != 0 || at >= task.rows) continue;
    if (partial) {
      output.partials.lse[task.first + at] = lse;
    } else if (output.lse.data != nullptr) {
      const int row = task.row0 + at, token = row / arguments.group;
      const int head = task.head * arguments.group + row - token * arguments.group;
      output.lse.data[head * output.lse.head_stride + token * output.lse.token_stride] =
          lse * std::numbers::ln2_v<float>;
    }
  }
}

// Partials keep the fragment order, so that a lane's words are 16 bytes of a row as they are; final rows are put in
// natural order within each quad first. Either way a quad stores 64 contiguous bytes.
template <class T, int d>
__device__ __forceinline__ void store_output(const float (&o)[d / 2], const float (&factor)[2], const Task& task,
                                             int place, int c, const Arguments& arguments) {
  const AttendOutput& output = arguments.output;
  const bool partial = output.partials.out != nullptr;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = place + 8 * i;
    T* to;
    if (partial) {
      to = static_cast<T*>(output.partials.out) + (task.first + at) * d;
    } else {
      const int row = task.row0 + at, token = row / arguments.group;
      const int head = task.head * arguments.group + row - token * arguments.group;
      to = static_cast<T*>(output.out.data) + token * output.out.token_stride + head * output.out.head_stride;
    }
#pragma unroll
    for (int m = 0; m < d / 32; ++m) {
      std::uint32_t words[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int j = 16 * m + 4 * x + 2 * i;
        const std::uint32_t pair = ptx::pack<T>(o[j] * factor[i], o[j + 1] * factor[i]);
        words[x] = factor[i] == 0.0f ? 0 : pair;  // 0 even where the values are not finite
      }
      if (!partial) quad_transpose(words, c);
      if (at < task.rows) {
        __stcs(reinterpret_cast<uint4*>(to + 32 * m + 8 * c), make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

}  // namespace moba::cuda::streaming
