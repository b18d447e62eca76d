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

// Splits entries into singles of at least `bar` (above -inf), in place: single i never passes entry i / 2. `entries`
// counts those of the row. Returns how many singles the lane has got.
__device__ __forceinline__ int split_entries(const PairLane& lane, int entries, float bar) {
  constexpr int kBatch = 4;  // loads in flight; lists have room for a multiple of 2 kBatch entries
  const int longest = (__reduce_max_sync(~0u, entries) + 1) >> 1;
  int singles = 0;
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
      if (x[e] >= bar) lane.store(singles++, x[e], block[e]);
      if (y[e] >= bar) lane.store(singles++, y[e], block[e] + 1);
    }
  }
  return singles;
}

// Among the singles of a row that equal `least` the more recent blocks are picked: the least block of them that is, or
// -1 for a row that picks all. `reached` counts the lane's singles of at least `least`.
__device__ __forceinline__ int least_tied_block(const PairLane& lane, int singles, int reached, float least, int rank) {
  const int row_reached = reached + __shfl_xor_sync(~0u, reached, 1);
  if (!__any_sync(~0u, row_reached > rank)) return -1;
  int above = 0;
  for (int i = 0; i < singles; ++i) {
    float score;
    int block;
    lane.load(i, score, block);
    above += score > least;
  }
  above += __shfl_xor_sync(~0u, above, 1);
  const int needed = row_reached > rank ? rank - above : 0;
  const int rounds = __reduce_max_sync(~0u, needed);
  int result = -1, below = INT_MAX;
  for (int round = 0; round < rounds; ++round) {
    int next = -1;
    for (int i = 0; i < singles; ++i) {
      float score;
      int block;
      lane.load(i, score, block);
      if (score == least && block < below) next = max(next, block);
    }
    below = max(next, __shfl_xor_sync(~0u, next, 1));
    if (round < needed) result = below;
  }
  return result;
}

// Picks the `rank` best singles of each row: all if there are fewer; among equal scores the more recent block. `room`
// is 8 or 16 and at least rank; exact_rank is rank, or 0 where only the run knows it. Only singles of at least `bar`
// count; rank of the row's best are, if it has so many. With `spread` the result may come spread.
template <int room, int exact_rank, bool spread>
__device__ __forceinline__ Picked pick(const PairLane& lane, int entries, float bar, int rank) {
  const int singles = split_entries(lane, entries, bar);
  const bool few = __all_sync(~0u, singles <= room);  // the usual case: every lane has its singles in registers
  float score[room], best[room];
  int block[room];
  if (few) {
#pragma unroll
    for (int i = 0; i < room; ++i) {
      lane.load(i, score[i], block[i]);
      if (i >= singles) score[i] = -INFINITY;
      best[i] = score[i];
    }
    sort<LargestFirst>(best);
  } else {
    const int longest = __reduce_max_sync(~0u, singles);
#pragma unroll
    for (int i = 0; i < room; ++i) best[i] = -INFINITY;
    for (int i = 0; i < longest; ++i) {
      float next = -INFINITY;
      int unused;
      if (i < singles) lane.load(i, next, unused);
#pragma unroll
      for (int j = 0; j < room; ++j) {
        const float greater = fmaxf(best[j], next);
        next = fminf(best[j], next);
        best[j] = greater;
      }
    }
  }
  float least;
  if constexpr (exact_rank > 0) {
    least = ranked_of_two_lanes<LargestFirst, exact_rank>(best, 1);
  } else {
    least = ranked_of_two_lanes<LargestFirst>(best, 1, rank);
  }
  least = fmaxf(least, -FLT_MAX);

  int reached = 0;
  if (few) {
#pragma unroll
    for (int i = 0; i < room; ++i) reached += score[i] >= least;
  } else {
    for (int i = 0; i < singles; ++i) {
      float s;
      int b;
      lane.load(i, s, b);
      reached += s >= least;
    }
  }
  const int tied = least_tied_block(lane, singles, reached, least, rank);
  const auto picks = [&](float s, int b) { return s > least || (s == least && b >= tied); };
  int count = 0;
  if (few) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < room; ++i) {
      if (picks(score[i], block[i])) {
        if constexpr (spread) {
          ptx::store_shared(lane.entry(count), static_cast<std::uint32_t>(block[i]));
        } else {
          lane.store(count, score[i], block[i]);
        }
        ++count;
      }
    }
  } else {
    for (int i = 0; i < singles; ++i) {
      float s;
      int b;
      lane.load(i, s, b);
      if (picks(s, b)) lane.store(count++, s, b);
    }
  }
  __syncwarp();
  return {count, least, spread && few};
}

// Where picked block p of a row lies, for either lane of the pair; `even` of them were picked by the even lane.
__device__ __forceinline__ std::uint32_t picked_address(std::uint32_t entry0, int p, int even, bool spread) {
  const bool odd = p >= even;
  const PairLane lane{entry0, odd};
  const int i = odd ? p - even : p;
  return spread ? lane.entry(i) : lane.single(i) + 4;
}

// Cuts the row's list down to its `rank` best, one to an entry. Returns their number and the least score.
template <int room, int exact_rank>
__device__ __forceinline__ Picked compact(const PairLane& lane, int entries, float bar, int rank) {
  const Picked picked = pick<room, exact_rank, false>(lane, entries, bar, rank);
  const int other = __shfl_xor_sync(~0u, picked.count, 1);
  const int even = lane.odd ? other : picked.count, count = picked.count + other;
  float score[room / 2];
  int block[room / 2];
#pragma unroll
  for (int e = 0; e < room / 2; ++e) {
    const int p = 2 * e + lane.odd;
    const bool from_odd = p >= even;
    if (p < count) PairLane{lane.entry0, from_odd}.load(from_odd ? p - even : p, score[e], block[e]);
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < room / 2; ++e) {
    if (2 * e + lane.odd < count) {
      ptx::store_shared(lane.entry(e), __float_as_uint(score[e]), __float_as_uint(-INFINITY));
      ptx::store_shared(lane.entry(e) + 8, static_cast<std::uint32_t>(block[e]));
    }
  }
  __syncwarp();
  return {count, picked.least, false};
}

}  // namespace moba::cuda::gating
