// What the key warpgroups of backward_sm90.cu do with a tile of rows. Of a tile's transposed matrices [64 keys, 64
// rows], and of dK and dV [64 keys, d], warp w of a warpgroup has the keys 16w to 16w + 15. Its lane 4r + c has the
// columns 8j + 2c, 8j + 2c + 1 of two keys: of key r in x[4j], x[4j + 1], of key r + 8 in x[4j + 2], x[4j + 3].
#pragma once

#include <cstdint>

#include "cuda/backward_sm90_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace moba::cuda::gradient {

inline constexpr int kGroupKeys = 64;  // of a warpgroup

// A sum [64 keys, d] times `factor`, as rows of 16-bit elements or of floats; `to` is that of key r, `pitch` elements
// from a key to the next. Keys from `keys` on, counted from key r, are not written.
template <class T, int n>
__device__ __forceinline__ void store_final(const float (&sum)[n], float factor, std::uint16_t* to, std::int64_t pitch,
                                            int keys) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < n / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t words[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int i = 16 * m + 4 * x + 2 * half;
        words[x] = ptx::pack<T>(sum[i] * factor, sum[i + 1] * factor);
      }
      quad_transpose(words, c);
      if (8 * half >= keys) continue;
      *reinterpret_cast<uint4*>(to + 8 * half * pitch + 32 * m + 8 * c) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// `adds`: to what is there.
template <int n>
__device__ __forceinline__ void store_floats(const float (&sum)[n], float factor, float* to, int keys, bool adds) {
  constexpr int d = 2 * n;
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < n / 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= keys) continue;
      float2* place = reinterpret_cast<float2*>(to + 8 * half * d + 8 * j + 2 * c);
      const float2 before = adds ? *place : make_float2(0, 0);
      const int i = 4 * j + 2 * half;
      *place = make_float2(before.x + sum[i] * factor, before.y + sum[i + 1] * factor);
    }
  }
}

enum class Sum { dk, dv };

// One of the two sums of a unit, of which this lane's first key is key `key`.
template <Sum which, class T, class L>
__device__ __forceinline__ void store_sum(const Arguments& arguments, const Unit& unit, int key,
                                          const float (&sum)[L::kHeadDim / 2]) {
  constexpr bool is_dk = which == Sum::dk;
  constexpr int d = L::kHeadDim;
  const float factor = is_dk ? arguments.scale : 1;
  const int keys = unit.keys - key;
  if (unit.share >= 0) {
    constexpr std::int64_t kFloats = std::int64_t{L::kKeys} * d;
    float* to = arguments.shares + (2 * static_cast<std::int64_t>(unit.share) + (is_dk ? 0 : 1)) * kFloats;
    return store_floats(sum, factor, to + key * d, keys, false);
  }
  const std::int64_t token = unit.key_begin + key;
  float* totals = is_dk ? arguments.totals.dk : arguments.totals.dv;
  if (totals != nullptr) return store_floats(sum, factor, totals + token * d, keys, true);
  const View<void>& view = is_dk ? arguments.dk : arguments.dv;
  store_final<T>(sum, factor,
                 static_cast<std::uint16_t*>(view.data) + token * view.token_stride + unit.head * view.head_stride,
                 view.token_stride, keys);
}

// S^T -> P^T.
__device__ __forceinline__ void weigh(float (&s)[32], float factor) {
#pragma unroll
  for (float& x : s) x = ptx::exp2_approx(x * factor);
}

// The first rows of the unit that do not see its key `key`: rows ascend, and so does what they see. Mostly they are
// consecutive.
__device__ __forceinline__ int blind_rows(const Arguments& arguments, const Unit& unit, int key) {
  if (key >= unit.keys) return unit.rows;
  const std::int64_t first = (static_cast<std::int64_t>(unit.first_token) + key) * arguments.group;
  if (unit.row0 >= 0) return static_cast<int>(min(max(first - unit.row0, std::int64_t{0}), std::int64_t{unit.masked}));
  int low = 0, high = unit.masked;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (arguments.rows[unit.first + middle] < first) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first rows of the unit, all others of which see all kKeys keys.
template <class L>
__device__ __forceinline__ int rows_to_mask(const Unit& unit) {
  return unit.keys < L::kKeys ? unit.rows : unit.masked;
}

// P^T is 0 where a row does not see this lane's keys, `key` and `key` + 8; `row` is row 2c of the tile.
__device__ __forceinline__ void mask_weights(float (&p)[32], const Arguments& arguments, const Unit& unit, int key,
                                             int row) {
  const int blind0 = blind_rows(arguments, unit, key) - row, blind1 = blind_rows(arguments, unit, key + 8) - row;
  if (!__any_sync(kAllLanes, blind1 > 0)) return;  // the later key is seen by no more rows than the earlier
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i < blind0) p[4 * j + i] = 0;
      if (8 * j + i < blind1) p[4 * j + 2 + i] = 0;
    }
  }
}

template <class T>
__device__ __forceinline__ void pack_weights(std::uint32_t (&p)[16], const float (&s)[32]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) p[j] = ptx::pack<T>(s[2 * j], s[2 * j + 1]);
}

// P^T, as packed for dV, and dP^T -> dS^T, packed.
template <class T>
__device__ __forceinline__ void slopes(std::uint32_t (&ds)[16], const std::uint32_t (&p)[16], const float (&dp)[32]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 weights = ptx::unpack<T>(p[j]);
    ds[j] = ptx::pack<T>(weights.x * dp[2 * j], weights.y * dp[2 * j + 1]);
  }
}

// [64 keys, 64 rows] = A [64 keys, d] B^T, both K-major, plus the terms of each row that the weights pick: K Q^T - lse
// or V dO^T - delta.
template <class T, class L>
__device__ __forceinline__ void issue_transposed(float (&product)[32], std::uint32_t keys, std::uint32_t rows,
                                                 std::uint32_t weights, std::uint32_t terms) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < L::kHeadDim / 16; ++k) {
    ptx::wgmma<T>(product, keys + k / 4 * (L::kKeyBand / 16) + k % 4 * 2,
                  rows + k / 4 * (L::kTileBand / 16) + k % 4 * 2, k > 0);
  }
  ptx::wgmma_add_terms(product, weights, terms);
  ptx::wgmma_commit();
}

// Where this lane writes dS of its warp's 16 keys, counted from a band [64 rows, 64 keys]: lane l stores row l % 8 of
// 8x8 tile l / 8: keys 8 (l / 8 % 2) on, rows 8 (l / 16) on.
__device__ __forceinline__ int slopes_place(int warp, int lane) {
  return swizzled(kBandBytes, lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
}
// dS^T, as packed, to the next stage of dS; `place` is this lane's, counted from the stage.
template <class L>
__device__ __forceinline__ void store_slopes(std::uint32_t base, int place, Stage<L::kDSStages>& stage,
                                             const std::uint32_t (&ds)[16]) {
  const std::uint32_t to = base + L::kDS + stage.number * L::kDSBytes + place;
  ptx::barrier_wait(base + L::kDSEmpty + stage.number * 8, stage.parity);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    ptx::store_matrix_x4_transposed(to + j * 16 * kBandBytes, ds[4 * j], ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3]);
  }
  ptx::fence_async_proxy();
  __syncwarp();
  ptx::barrier_arrive_if(threadIdx.x % 32 == 0, base + L::kDSFull + stage.number * 8);
  stage.next();
}

// sum [64 keys, d] (+)= weights [64 keys, 64 rows] rows [64 rows, d]: P^T dO or dS^T Q.
template <class T, int n>
__device__ __forceinline__ void issue_sum(float (&sum)[n], const std::uint32_t (&weights)[16], std::uint32_t rows,
                                          bool accumulate) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileRows / 16; ++k) {
    ptx::wgmma_registers<T>(sum, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3],
                            rows + k * kBandBytes, accumulate || k > 0);
  }
  ptx::wgmma_commit();
}

}  // namespace moba::cuda::gradient
