// The selection of gate_sm90.cu: from a tile of scores in registers to the lists of its rows (steps 1 to 3 there).
#pragma once

#include <cuda_bf16.h>

#include <cfloat>
#include <cstdint>

#include "cuda/gate_items.cuh"
#include "cuda/gate_list.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/sorting_network.cuh"

namespace moba::cuda::gating {

// What a lane knows of its two rows, lane / 4 and lane / 4 + 8 of the warp's 16.
template <class C>
struct Rows {
  float maxima[2][C::kGroups];
  float threshold[2];  // scores are appended if greater
  int entries[2];      // in the list
  std::uint32_t list;  // entry 0 of the first; the second's is kSecond bytes behind
  static constexpr int kSecond = 8 * 16;
};

// A sum over the quad, and the sum over its lanes below this one. Both halves of the word are sums of their own.
__device__ __forceinline__ std::uint32_t quad_prefix_sum(std::uint32_t x, std::uint32_t& below) {
  const std::uint32_t neighbour = __shfl_xor_sync(kAllLanes, x, 1), two = x + neighbour;
  const std::uint32_t other_two = __shfl_xor_sync(kAllLanes, two, 2);
  below = (threadIdx.x & 1 ? neighbour : 0) + (threadIdx.x & 2 ? other_two : 0);
  return two + other_two;
}

// A float below every number that truncates (toward zero) to these upper 16 bits; NaN for -inf.
__device__ __forceinline__ float below_truncated(std::uint32_t bits) {
  const auto value = static_cast<std::int32_t>(bits);
  return __uint_as_float(value > 0 ? bits - 1 : (bits | 0x80000000u) + 0x10000u);
}

// Raises the thresholds: sorts the lane's group maxima of both rows, merges them with those of lane ^ 1, and takes the
// one of the rank wanted in the union with lane ^ 2.
template <class C>
__device__ __forceinline__ void raise_bars(Rows<C>& rows, int rank) {
  constexpr int n = C::kGroups;
  __nv_bfloat162 mine[n], both[2 * n];
#pragma unroll
  for (int g = 0; g < n; ++g) {
    const std::uint32_t pair =
        __byte_perm(__float_as_uint(rows.maxima[0][g]), __float_as_uint(rows.maxima[1][g]), 0x7632);
    mine[g] = *reinterpret_cast<const __nv_bfloat162*>(&pair);
  }
  sort<LargestFirstPairs>(mine);
#pragma unroll
  for (int g = 0; g < n; ++g) {
    both[g] = mine[g];
    both[2 * n - 1 - g] = __shfl_xor_sync(kAllLanes, mine[g], 1);
  }
  sort_bitonic<LargestFirstPairs>(both);
  const __nv_bfloat162 bound = ranked_of_two_lanes<LargestFirstPairs, C::kLowestRank, C::kHighestRank>(both, 2, rank);
  const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(&bound);
  rows.threshold[0] = fmaxf(rows.threshold[0], below_truncated(bits << 16));  // fmaxf drops NaN
  rows.threshold[1] = fmaxf(rows.threshold[1], below_truncated(bits & 0xffff0000u));
}

// Sets to -inf the scores of columns that are no candidates of their row. first: block of column 0 of the tile.
// `common` are the candidates of all the warp's rows: goes inwards from the ends of the tile until it meets them.
template <int begin>
__device__ __forceinline__ void mask(float (&scores)[64 - 4 * begin], const Limits (&limits)[2], int first,
                                     const Limits& common) {
  const int column = first + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int j = 15; j >= begin; --j) {
    if (first + 8 * j + 8 <= common.high) break;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      if (8 * j + x % 2 >= limits[x / 2].high - column) scores[4 * (j - begin) + x] = -INFINITY;
    }
  }
#pragma unroll
  for (int j = begin; j < 16; ++j) {
    if (first + 8 * j >= common.low) break;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      if (8 * j + x % 2 < limits[x / 2].low - column) scores[4 * (j - begin) + x] = -INFINITY;
    }
  }
}

// The rare way to append: a list would overflow. The tile is parked in local memory, where it does not cost the usual
// way its registers, and goes on 32 columns (at most 16 pairs of a row) at a time, newest first. Where they do not fit
// every list of the warp is cut down to its best, and what equals the least of them has lost from then on.
template <class C, int begin>
__device__ __forceinline__ void append_slowly(float (&scores)[64 - 4 * begin], Rows<C>& rows, const PairLane& pair,
                                              int rank, int first_block) {
  constexpr int kScores = 64 - 4 * begin;
  const int lane = threadIdx.x & 31;
  volatile float parked[kScores + 2 * C::kGroups];
#pragma unroll
  for (int j = 0; j < kScores; ++j) parked[j] = scores[j];
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
    parked[kScores + g] = rows.maxima[0][g];
    parked[kScores + C::kGroups + g] = rows.maxima[1][g];
  }
#pragma unroll 1
  for (int part = kScores / 16 - 1; part >= 0; --part) {
    const volatile float* x = parked + 16 * part;
    std::uint32_t below, total;
    while (true) {
      std::uint32_t count = 0;
      for (int j = 0; j < 16; j += 4) {
        if (fmaxf(x[j], x[j + 1]) > rows.threshold[0]) count += 1;
        if (fmaxf(x[j + 2], x[j + 3]) > rows.threshold[1]) count += 0x10000;
      }
      total = quad_prefix_sum(count, below);
      const bool full =
          rows.entries[0] + (total & 0xffff) > C::kEntries || rows.entries[1] + (total >> 16) > C::kEntries;
      if (!__any_sync(kAllLanes, full)) break;
      __syncwarp();
      const int row = lane >> 1, quad = (row & 7) * 4;
      const int entries0 = __shfl_sync(kAllLanes, rows.entries[0], quad),
                entries1 = __shfl_sync(kAllLanes, rows.entries[1], quad);
      const float threshold0 = __shfl_sync(kAllLanes, rows.threshold[0], quad),
                  threshold1 = __shfl_sync(kAllLanes, rows.threshold[1], quad);
      const Picked picked = compact<C::kCapacity, C::kLowestRank, C::kHighestRank>(
          pair, row < 8 ? entries0 : entries1, fmaxf(row < 8 ? threshold0 : threshold1, -FLT_MAX), rank);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int picker = 2 * (lane >> 2) + 16 * r;
        const float least = __shfl_sync(kAllLanes, picked.least, picker);
        rows.entries[r] = __shfl_sync(kAllLanes, picked.count, picker);
        if (rows.entries[r] == rank) rows.threshold[r] = fmaxf(rows.threshold[r], least);
      }
    }
    std::uint32_t to0 = rows.list + (rows.entries[0] + (below & 0xffff)) * kEntryStride;
    std::uint32_t to1 = rows.list + Rows<C>::kSecond + (rows.entries[1] + (below >> 16)) * kEntryStride;
    for (int j = 0; j < 4; ++j) {
      const float a = x[4 * j], b = x[4 * j + 1], c = x[4 * j + 2], d = x[4 * j + 3];
      const int block = first_block + 8 * (begin + 4 * part + j);
      ptx::append_if_greater<kEntryStride>(to0, fmaxf(a, b), rows.threshold[0], a, b, block);
      ptx::append_if_greater<kEntryStride>(to1, fmaxf(c, d), rows.threshold[1], c, d, block);
    }
    rows.entries[0] += total & 0xffff;
    rows.entries[1] += total >> 16;
  }
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
    rows.maxima[0][g] = parked[kScores + g];
    rows.maxima[1][g] = parked[kScores + C::kGroups + g];
  }
}

// Steps 1 to 3 on the scores of column groups begin .. 15 of a tile; first_block is the lane's first block in group 0.
template <class C, int begin>
__device__ __forceinline__ void select(float (&scores)[64 - 4 * begin], Rows<C>& rows, const PairLane& pair, int rank,
                                       int first_block) {
  float best0[16], best1[16];  // of a pair of columns
#pragma unroll
  for (int j = begin; j < 16; ++j) {
    const float* x = scores + 4 * (j - begin);
    best0[j] = fmaxf(x[0], x[1]);
    best1[j] = fmaxf(x[2], x[3]);
    rows.maxima[0][j % C::kGroups] = fmaxf(rows.maxima[0][j % C::kGroups], best0[j]);
    rows.maxima[1][j % C::kGroups] = fmaxf(rows.maxima[1][j % C::kGroups], best1[j]);
  }
  raise_bars(rows, rank);

  // Counted by the sign bits of threshold - score, which agree with score > threshold (NaN has no sign here): a
  // subtraction and a shift. Compared as the append does it, the compiler would keep 32 predicates in a register, two
  // operations each. In two halves of a row: four independent chains.
  constexpr int kHalfRow = (16 - begin) / 2;
  std::uint32_t signs0[2] = {0, 0}, signs1[2] = {0, 0};
#pragma unroll
  for (int j = begin; j < begin + kHalfRow; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = j + half * kHalfRow;
      signs0[half] = __funnelshift_l(__float_as_uint(rows.threshold[0] - best0[i]), signs0[half], 1);
      signs1[half] = __funnelshift_l(__float_as_uint(rows.threshold[1] - best1[i]), signs1[half], 1);
    }
  }
  const std::uint32_t early0 = __popc(signs0[0]), early1 = __popc(signs1[0]);
  std::uint32_t below;
  const std::uint32_t total = quad_prefix_sum(early0 + __popc(signs0[1]) + ((early1 + __popc(signs1[1])) << 16), below);
  const bool full = rows.entries[0] + (total & 0xffff) > C::kEntries || rows.entries[1] + (total >> 16) > C::kEntries;
  if (__any_sync(kAllLanes, full)) {
    append_slowly<C, begin>(scores, rows, pair, rank, first_block);
    return;
  }
  std::uint32_t to0 = rows.list + (rows.entries[0] + (below & 0xffff)) * kEntryStride;
  std::uint32_t to1 = rows.list + Rows<C>::kSecond + (rows.entries[1] + (below >> 16)) * kEntryStride;
  std::uint32_t late_to0 = to0 + early0 * kEntryStride, late_to1 = to1 + early1 * kEntryStride;
#pragma unroll
  for (int j = begin; j < begin + kHalfRow; ++j) {
    const int late = j + kHalfRow;
    const float *x = scores + 4 * (j - begin), *y = scores + 4 * (late - begin);
    ptx::append_if_greater<kEntryStride>(to0, best0[j], rows.threshold[0], x[0], x[1], first_block + 8 * j);
    ptx::append_if_greater<kEntryStride>(to1, best1[j], rows.threshold[1], x[2], x[3], first_block + 8 * j);
    ptx::append_if_greater<kEntryStride>(late_to0, best0[late], rows.threshold[0], y[0], y[1], first_block + 8 * late);
    ptx::append_if_greater<kEntryStride>(late_to1, best1[late], rows.threshold[1], y[2], y[3], first_block + 8 * late);
  }
  rows.entries[0] += total & 0xffff;
  rows.entries[1] += total >> 16;
}

}  // namespace moba::cuda::gating
