// The end of a row in gate_sm90.cu: the exact pick from its list (step 4 there) and its ids.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <climits>
#include <cstdint>

#include "cuda/gate_items.cuh"
#include "cuda/gate_list.cuh"
#include "cuda/gate_select.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/sorting_network.cuh"

namespace moba::cuda::gating {

// Chosen blocks of a row, spread over a pair of lanes: place p is element p % (capacity / 2) of lane p / (capacity / 2)
// of the pair. INT_MAX where there is none.
template <int capacity>
struct Choice {
  int block[capacity / 2];
  int count;  // of the row
};

__device__ __forceinline__ bool is_nan(std::uint16_t x, bool bf16) { return (x & 0x7fff) > (bf16 ? 0x7f80 : 0x7c00); }

template <int d>
__device__ __forceinline__ bool scores_nan(const void* q, const void* centroid, bool bf16) {
  float sum = 0.0f;
  for (int i = 0; i < d / 2; ++i) {
    const std::uint32_t a = static_cast<const std::uint32_t*>(q)[i], b = static_cast<const std::uint32_t*>(centroid)[i];
    const float2 x = bf16 ? ptx::unpack<__nv_bfloat16>(a) : ptx::unpack<__half>(a);
    const float2 y = bf16 ? ptx::unpack<__nv_bfloat16>(b) : ptx::unpack<__half>(b);
    sum = fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
  }
  return isnan(sum);
}

// The rare end: a row has candidates left and too few in its list, because the others scored -inf or NaN. Takes the
// most recent of those at -inf, then of the NaN. The warp does one row after the other, 32 blocks at a time; row0 is
// its first row in the slab, limits those of this lane's row. The rows' lists hold the choice meanwhile.
template <class C>
__device__ __forceinline__ void fill_up(const Arguments& a, const Item& item, int row0, const Limits& limits,
                                        const PairLane& pair, Choice<C::kCapacity>& choice, unsigned short_rows) {
  constexpr int kHalfRoom = C::kCapacity / 2;
  const int lane = threadIdx.x & 31, head = a.slab.head_begin + item.head;
  const bool bf16 = a.shape.dtype == DType::bf16;
  const std::uint32_t mine = pair.entry0 + (pair.odd ? kHalfRoom * kEntryStride : 0);
#pragma unroll
  for (int e = 0; e < kHalfRoom; ++e) {
    ptx::store_shared(mine + e * kEntryStride, static_cast<std::uint32_t>(choice.block[e]));
  }
  __syncwarp();
  for (unsigned left = short_rows; left != 0; left &= left - 1) {
    const int even = __ffs(left) - 1;  // the even lane of the row
    const std::uint32_t list = __shfl_sync(kAllLanes, pair.entry0, even);
    const int low = __shfl_sync(kAllLanes, limits.low, even), high = __shfl_sync(kAllLanes, limits.high, even);
    const int row = row0 + even / 2, token = a.by_group(row);
    const int q_head = head * a.shape.group + row - token * a.shape.group;
    const auto* q = static_cast<const std::uint16_t*>(a.q.data) + (a.slab.token_begin + token) * a.q.token_stride +
                    q_head * a.q.head_stride;
    bool nan_in_q = false;  // then every score is NaN
    for (int i = lane; i < C::kDim; i += 32) nan_in_q |= is_nan(q[i], bf16);
    nan_in_q = __any_sync(kAllLanes, nan_in_q);
    int count = __shfl_sync(kAllLanes, choice.count, even);
    for (int nan = nan_in_q ? 1 : 0; nan < 2; ++nan) {
      for (int end = high; end > low && count < a.choose; end -= 32) {
        const int block = end - 1 - lane;
        bool open = block >= low;
        for (int p = 0; p < count; ++p) open &= block != static_cast<int>(ptx::load_shared(list + p * kEntryStride));
        if (open) {
          const auto* centroid = static_cast<const std::uint16_t*>(a.centroids.data) +
                                 block * a.centroids.token_stride + head * a.centroids.head_stride;
          open = (nan_in_q || scores_nan<C::kDim>(q, centroid, bf16)) == (nan == 1);
        }
        const unsigned found = __ballot_sync(kAllLanes, open);
        const int place = count + __popc(found & ptx::lane_mask_below());
        if (open && place < a.choose) {
          ptx::store_shared(list + place * kEntryStride, static_cast<std::uint32_t>(block));
        }
        count = min(count + __popc(found), a.choose);
        __syncwarp();
      }
    }
    if ((lane & ~1) == even) choice.count = count;
  }
#pragma unroll
  for (int e = 0; e < kHalfRoom; ++e) choice.block[e] = static_cast<int>(ptx::load_shared(mine + e * kEntryStride));
  __syncwarp();
}

// Puts the blocks in ascending order and writes them, less the sequence's first, the own block and the -1 behind.
template <class C>
__device__ __forceinline__ void write_ids(const Arguments& a, const Item& item, int row, const Limits& limits, bool odd,
                                          Choice<C::kCapacity>& choice) {
  constexpr int kHalfRoom = C::kCapacity / 2;
  sort<SmallestFirst>(choice.block);
  merge_two_lanes<SmallestFirst>(choice.block, odd);
  if (is_past(a, row)) return;
  const int slots = a.shape.slots, begin = odd ? kHalfRoom : 0;
  const bool has_own = a.shape.causal && limits.high >= limits.low;
  const int own = has_own ? limits.high - limits.low : -1;
  const int token = a.by_group(row), head_in_group = row - token * a.shape.group;
  std::int32_t* to =
      a.ids.data + item.head * a.ids.head_stride + token * a.ids.token_stride + head_in_group * a.ids.group_stride;
#pragma unroll
  for (int e = 0; e < kHalfRoom; ++e) {
    const int p = begin + e;
    choice.block[e] = p < choice.count ? choice.block[e] - limits.low : p == choice.count ? own : -1;
  }
  if (a.ids_by_four) {
#pragma unroll
    for (int e = 0; e < kHalfRoom; e += 4) {
      if (begin + e < slots) {
        // An assignment was taken apart into four stores.
        __stwb(reinterpret_cast<int4*>(to + begin + e),
               make_int4(choice.block[e], choice.block[e + 1], choice.block[e + 2], choice.block[e + 3]));
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < kHalfRoom; ++e) {
      if (begin + e < slots) to[begin + e] = choice.block[e];
    }
  }
  if (odd && slots > C::kCapacity) to[C::kCapacity] = choice.count == C::kCapacity ? own : -1;
  if (!odd && a.counts.data != nullptr) {
    a.counts.data[item.head * a.counts.head_stride + token * a.counts.token_stride +
                  head_in_group * a.counts.group_stride] = choice.count + (has_own ? 1 : 0);
  }
}

// Step 4 and the output, two lanes to a row: `pair` is of row lane / 2 of the warp's 16, the first of which is row0.
template <class C>
__device__ __forceinline__ void finish(const Arguments& a, const Item& item, int row0, const Limits& limits,
                                       const Rows<C>& rows, const PairLane& pair, int rank, bool scored) {
  constexpr int kHalfRoom = C::kCapacity / 2;
  const int lane = threadIdx.x & 31, row = lane >> 1, begin = pair.odd ? kHalfRoom : 0;
  Choice<C::kCapacity> choice;
  if (scored) {
    __syncwarp();
    const int quad = (row & 7) * 4;
    const int entries0 = __shfl_sync(kAllLanes, rows.entries[0], quad),
              entries1 = __shfl_sync(kAllLanes, rows.entries[1], quad);
    const float threshold0 = __shfl_sync(kAllLanes, rows.threshold[0], quad),
                threshold1 = __shfl_sync(kAllLanes, rows.threshold[1], quad);
    const Picked picked = pick<C::kCapacity, C::kLowestRank, C::kHighestRank, true>(
        pair, row < 8 ? entries0 : entries1, fmaxf(row < 8 ? threshold0 : threshold1, -FLT_MAX), rank);
    const int other = __shfl_xor_sync(kAllLanes, picked.count, 1), even = pair.odd ? other : picked.count;
    choice.count = picked.count + other;
    load_picked(pair, picked, even, begin, choice.block);
#pragma unroll
    for (int e = 0; e < kHalfRoom; ++e) {
      if (begin + e >= choice.count) choice.block[e] = INT_MAX;
    }
    __syncwarp();  // the lists may be overwritten
  }
  const int candidates = limits.count(), all = min(candidates, rank);
  if (candidates <= rank || !scored) {
    choice.count = all;
#pragma unroll
    for (int e = 0; e < kHalfRoom; ++e) choice.block[e] = begin + e < all ? limits.low + begin + e : INT_MAX;
  }
  const unsigned short_rows = __ballot_sync(kAllLanes, !pair.odd && choice.count < all && !is_past(a, row0 + row));
  if (short_rows != 0) fill_up<C>(a, item, row0, limits, pair, choice, short_rows);
  write_ids<C>(a, item, row0 + row, limits, pair.odd, choice);
}

}  // namespace moba::cuda::gating
