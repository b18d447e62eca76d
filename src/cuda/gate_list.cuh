// The gate's list of a row: candidate blocks with their scores, in shared memory, and the exact pick among them.
//
// The lists of the 64 rows of a warpgroup stand side by side: entry e of row r takes the 16 bytes at e * kEntryStride +
// 16 r and holds the scores of two neighbouring blocks and the first one's number {score, score, block, -}. To pick, a
// row's entries are shared out to a pair of lanes, even entries to the even lane, where an entry splits into two
// singles {score, block} of 8 bytes.
#pragma once

#include <cfloat>
#include <climits>
#include <cstdint>

#include "cuda/lanes.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/sorting_network.cuh"

namespace moba::cuda::gating {

inline constexpr int kEntryStride = 64 * 16;

// The part of a list that one lane of a pair picks from. entry0 is the address of the row's entry 0.
struct PairLane {
  std::uint32_t entry0;
  bool odd;

  __device__ __forceinline__ std::uint32_t entry(int i) const { return entry0 + (2 * i + odd) * kEntryStride; }
  __device__ __forceinline__ std::uint32_t single(int i) const { return entry(i >> 1) + (i & 1) * 8; }
  __device__ __forceinline__ void store(int i, float score, int block) const {
    ptx::store_shared(single(i), __float_as_uint(score), static_cast<std::uint32_t>(block));
  }
  __device__ __forceinline__ void load(int i, float& score, int& block) const {
    std::uint32_t s, b;
    ptx::load_shared(single(i), s, b);
    score = __uint_as_float(s);
    block = static_cast<int>(b);
  }
};

// What a lane of a pair has picked; it lies in its part of the list, as singles 0 .. count - 1 or, if spread, as block
// numbers in the first words of its entries 0 .. count - 1.
struct Picked {
  int count;
  float least;  // the score of rank `rank` of the row (both lanes), or -FLT_MAX
  bool spread;
};

// Appends singles to a lane's part of a list, from its beginning.
struct SingleWriter {
  std::uint32_t begin, to;
  __device__ __forceinline__ explicit SingleWriter(const PairLane& lane) : begin(lane.entry(0)), to(begin) {}
  __device__ __forceinline__ void append_if_reached(float score, float least, int block) {
    ptx::append_half_if_reached<2 * kEntryStride>(to, score, least, block);
  }
  __device__ __forceinline__ int count() const {
    const int bytes = static_cast<int>(to - begin);
    return bytes / (2 * kEntryStride) * 2 + ((bytes >> 3) & 1);
  }
};

// Splits entries into singles of at least `threshold` (above -inf), in place: single i never passes entry i / 2.
// `entries` counts those of the row. Returns how many singles the lane has got.
__device__ __forceinline__ int split_entries(const PairLane& lane, int entries, float threshold) {
  constexpr int kBatch = 4;  // loads in flight; lists hold a multiple of 2 kBatch entries
  const int longest = (__reduce_max_sync(kAllLanes, entries) + 1) >> 1;
  SingleWriter singles(lane);
  for (int i = 0; i < longest; i += kBatch) {
    float x[kBatch], y[kBatch];
    int block[kBatch];
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      std::uint32_t a, b, c, unused;
      ptx::load_shared(lane.entry(i + e), a, b, c, unused);
      const bool exists = 2 * (i + e) + lane.odd < entries;
      x[e] = exists ? __uint_as_float(a) : -INFINITY;
      y[e] = exists ? __uint_as_float(b) : -INFINITY;
      block[e] = static_cast<int>(c);
    }
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      singles.append_if_reached(x[e], threshold, block[e]);
      singles.append_if_reached(y[e], threshold, block[e] + 1);
    }
  }
  return singles.count();
}

// Of the lane's `count` singles, all of at least `least`, keeps those that the row picks: where both lanes together
// have more than `rank`, the more recent blocks of those that equal `least`. Returns their number.
__device__ __forceinline__ int drop_tied(const PairLane& lane, int count, int row_count, float least, int rank) {
  int above = 0;
  for (int i = 0; i < count; ++i) {
    float score;
    int block;
    lane.load(i, score, block);
    above += score > least;
  }
  above += __shfl_xor_sync(kAllLanes, above, 1);
  const int needed = row_count > rank ? rank - above : 0;
  const int rounds = __reduce_max_sync(kAllLanes, needed);
  int oldest = -1, below = INT_MAX;  // the oldest block picked of those that equal `least`
  for (int round = 0; round < rounds; ++round) {
    int next = -1;
    for (int i = 0; i < count; ++i) {
      float score;
      int block;
      lane.load(i, score, block);
      if (score == least && block < below) next = max(next, block);
    }
    below = max(next, __shfl_xor_sync(kAllLanes, next, 1));
    if (round < needed) oldest = below;
  }
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    float score;
    int block;
    lane.load(i, score, block);
    if (score > least || block >= oldest) lane.store(kept++, score, block);
  }
  return kept;
}

// Picks the `rank` best singles of each row: all if there are fewer; among equal scores the more recent block.
// `capacity` is 8 or 16, `rank` from lowest_rank to highest_rank, which is at most capacity. Only singles of at least
// `threshold` count; rank of the row's best are, if it has so many. With `spread` the result may come spread.
//
// The lane's first `capacity` singles are sorted by a network; the few behind them are inserted one by one (random
// scores leave such to 2 warps in 5 at rank 7 of 8). No branches but for those and for ties: stores are predicated.
template <int capacity, int lowest_rank, int highest_rank, bool spread>
__device__ __forceinline__ Picked pick(const PairLane& lane, int entries, float threshold, int rank) {
  const int singles = split_entries(lane, entries, threshold), longest = __reduce_max_sync(kAllLanes, singles);
  float score[capacity], best[capacity];
  int block[capacity];
#pragma unroll
  for (int i = 0; i < capacity; ++i) {
    lane.load(i, score[i], block[i]);
    if (i >= singles) score[i] = -INFINITY;
    best[i] = score[i];
  }
  sort<LargestFirst>(best);
#pragma unroll 1
  for (int i = capacity; i < longest; ++i) {
    float next;
    int unused;
    lane.load(i, next, unused);
    if (i >= singles) next = -INFINITY;
#pragma unroll
    for (int j = 0; j < capacity; ++j) {
      const float greater = fmaxf(best[j], next);
      next = fminf(best[j], next);
      best[j] = greater;
    }
  }
  const float least = fmaxf(ranked_of_two_lanes<LargestFirst, lowest_rank, highest_rank>(best, 1, rank), -FLT_MAX);

  Picked picked{0, least, spread && longest <= capacity};
  const auto keep_singles = [&] {
    SingleWriter kept(lane);
#pragma unroll
    for (int i = 0; i < capacity; ++i) kept.append_if_reached(score[i], least, block[i]);
#pragma unroll 1
    for (int i = capacity; i < longest; ++i) {
      float s;
      int b;
      lane.load(i, s, b);
      kept.append_if_reached(i < singles ? s : -INFINITY, least, b);
    }
    picked.count = kept.count();
  };
  if (picked.spread) {
    std::uint32_t to = lane.entry(0);
#pragma unroll
    for (int i = 0; i < capacity; ++i) ptx::append_if_reached<2 * kEntryStride>(to, score[i], least, block[i]);
    picked.count = static_cast<int>(to - lane.entry(0)) / (2 * kEntryStride);
  } else {
    keep_singles();
  }
  const int row_count = picked.count + __shfl_xor_sync(kAllLanes, picked.count, 1);
  if (__any_sync(kAllLanes, row_count > rank)) {
    if (picked.spread) keep_singles();
    picked.spread = false;
    picked.count = drop_tied(lane, picked.count, row_count, least, rank);
  }
  __syncwarp();
  return picked;
}

// Loads picked blocks begin .. begin + n - 1 of a row, of which the even lane has picked the first `even`. What is
// loaded past the row's last means nothing.
template <int n>
__device__ __forceinline__ void load_picked(const PairLane& lane, const Picked& picked, int even, int begin,
                                            int (&block)[n]) {
  if (picked.spread) {
    const std::uint32_t from_even = lane.entry0 + begin * (2 * kEntryStride);
    const std::uint32_t from_odd = from_even + (1 - 2 * even) * kEntryStride;
#pragma unroll
    for (int e = 0; e < n; ++e) {
      block[e] = static_cast<int>(ptx::load_shared((begin + e < even ? from_even : from_odd) + e * (2 * kEntryStride)));
    }
  } else {
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const bool odd = begin + e >= even;
      const std::uint32_t single = PairLane{lane.entry0, odd}.single(begin + e - (odd ? even : 0));
      block[e] = static_cast<int>(ptx::load_shared(single + 4));
    }
  }
}

// Cuts the row's list down to its `rank` best, one to an entry. Returns their number and the least score.
template <int capacity, int lowest_rank, int highest_rank>
__device__ __forceinline__ Picked compact(const PairLane& lane, int entries, float threshold, int rank) {
  const Picked picked = pick<capacity, lowest_rank, highest_rank, false>(lane, entries, threshold, rank);
  const int other = __shfl_xor_sync(kAllLanes, picked.count, 1);
  const int even = lane.odd ? other : picked.count, count = picked.count + other;
  float score[capacity / 2];
  int block[capacity / 2];
#pragma unroll
  for (int e = 0; e < capacity / 2; ++e) {
    const int p = 2 * e + lane.odd;
    const bool from_odd = p >= even;
    if (p < count) PairLane{lane.entry0, from_odd}.load(from_odd ? p - even : p, score[e], block[e]);
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < capacity / 2; ++e) {
    if (2 * e + lane.odd < count) {
      ptx::store_shared(lane.entry(e), __float_as_uint(score[e]), __float_as_uint(-INFINITY));
      ptx::store_shared(lane.entry(e) + 8, static_cast<std::uint32_t>(block[e]));
    }
  }
  __syncwarp();
  return {count, picked.least, false};
}

}  // namespace moba::cuda::gating
