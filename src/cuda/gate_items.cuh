// What the parts of gate_sm90.cu share: its sizes and arguments, how the work is divided, and what lies where in shared
// memory.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/gate_list.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/shared.cuh"

namespace moba::cuda::gating {

constexpr int kColumns = 128;          // centroids of a tile
constexpr int kOldest = 0, kHalf = 8;  // first of its 16 groups of 8 columns: the whole tile, the newer half

// d columns of q; lists of the `capacity` best; lowest_rank to highest_rank blocks to choose.
template <int d, int capacity, int lowest_rank, int highest_rank>
struct Config {
  static constexpr int kDim = d, kCapacity = capacity, kLowestRank = lowest_rank, kHighestRank = highest_rank;
  static constexpr int kGroups = capacity / 2;  // group maxima of a lane and row
  static constexpr int kConsumers = capacity == 8 ? 3 : 2;
  static constexpr int kConsumerRegisters = capacity == 8 ? 160 : 232, kProducerRegisters = capacity == 8 ? 32 : 40;
  static constexpr int kEntries = capacity == 8 ? 32 : 64;  // of a list
  static constexpr int kStages = 2;
  static constexpr int kRows = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);

  static constexpr int kTileBytes = kColumns * d * 2, kQueryBytes = 64 * d * 2, kListBytes = kEntries * kEntryStride;
  static constexpr int kQueries = kStages * kTileBytes;
  static constexpr int kLists = kQueries + kConsumers * kQueryBytes;
  static constexpr int kLimits = kLists + kConsumers * kListBytes;  // [2][consumers][64] of Limits
  static constexpr int kSpans = kLimits + 2 * kConsumers * 64 * 8;  // [2][consumers] of Span
  static constexpr int kBarriers = kSpans + 2 * kConsumers * 8;
  static constexpr int kSharedBytes = kBarriers + (2 * kStages + 2 * kConsumers) * 8;
  static_assert(highest_rank <= capacity && capacity + 16 <= kEntries && kEntries % 8 == 0 && kSharedBytes <= 232448);
};

struct Arguments {
  Shape shape;
  Slab slab;
  Batch batch;
  View<const void> q, centroids;
  IdsView<std::int32_t> ids;
  CountsView counts;
  Divide by_group, by_heads;
  int rows;                  // of the slab, in a key head
  int tiles = 0, items = 0;  // of rows; items are tiles of all key heads; both set at launch
  int choose;                // blocks besides the own one
  bool ids_by_four;          // ids can be stored 16 bytes at a time
  bool queries_by_box;       // the 64 rows of a consumer are all heads of some tokens
};

// A tile of rows of a key head (of the slab).
struct Item {
  int head, row;
};

// Thread blocks take turns at the items in snake order.
__device__ __forceinline__ int item_number(int i) {
  return i * static_cast<int>(gridDim.x) + static_cast<int>(i & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}
__device__ __forceinline__ bool has_item(const Arguments& a, int i) { return item_number(i) < a.items; }
// Item i of this thread block. The last tiles, which are the longest in a causal sequence, come first, heads side by
// side.
template <class C>
__device__ __forceinline__ Item item_at(const Arguments& a, int i) {
  const int x = item_number(i), y = a.by_heads(x);
  return {x - y * a.slab.heads, (a.tiles - 1 - y) * C::kRows};
}

__device__ __forceinline__ int clamp_row(const Arguments& a, int row, int offset) {
  return static_cast<int>(min(static_cast<unsigned>(row) + offset, static_cast<unsigned>(a.rows) - 1));
}

// A row of the last tile that does not exist; its number may have left the range of int.
__device__ __forceinline__ bool is_past(const Arguments& a, int row) {
  return static_cast<unsigned>(row) >= static_cast<unsigned>(a.rows);
}

// Candidates of a row: blocks low .. high - 1 of the batch. Where high >= low a causal row's own block is `high`;
// high = low - 1 for a row that chooses nothing. Both ascend with the row.
struct Limits {
  int low, high;
  __device__ __forceinline__ int count() const { return max(high - low, 0); }
};

__device__ __forceinline__ Limits limits_of(const Arguments& a, int token_of_slab) {
  const Candidates c = candidates_of(a.shape, a.batch, a.slab.token_begin + token_of_slab);
  return {c.low, a.shape.causal && !c.has_own ? c.low - 1 : c.high};
}

// Columns of an item: blocks high - 1 down to low in tiles of 128, the first of which ends at `high`. None (low = high)
// where every row chooses all of its candidates.
struct Span {
  int low, high;
};

// Called by whole warps.
template <class C>
__device__ __forceinline__ Span span_of(const Arguments& a, const Item& item) {
  const bool last = threadIdx.x & 1;
  const Limits limits = limits_of(a, a.by_group(clamp_row(a, item.row, last ? C::kRows - 1 : 0)));
  const int low = __shfl_sync(kAllLanes, limits.low, 0), high = __shfl_sync(kAllLanes, limits.high, 1);
  const bool all = a.choose == 0 || high - low <= a.choose;
  return {all ? high : low, high};
}
// The tile that begins at block `first` is needed in its newer half only.
__device__ __forceinline__ bool is_half(const Span& span, int first) { return first + kColumns / 2 <= span.low; }

// x, which is the same in all lanes; the compiler then knows it and keeps the warp converged.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

// Shared memory of the thread block, by address.
template <class C>
struct Shared {
  std::uint32_t base;
  __device__ __forceinline__ std::uint32_t tile(int stage) const { return base + stage * C::kTileBytes; }
  __device__ __forceinline__ std::uint32_t queries(int consumer) const {
    return base + C::kQueries + consumer * C::kQueryBytes;
  }
  __device__ __forceinline__ std::uint32_t lists(int consumer) const {
    return base + C::kLists + consumer * C::kListBytes;
  }
  // Limits and spans are written for an item while the one before may still be read, hence twice.
  __device__ __forceinline__ std::uint32_t limits(int item, int consumer, int row) const {
    return base + C::kLimits + (((item & 1) * C::kConsumers + consumer) * 64 + row) * 8;
  }
  __device__ __forceinline__ std::uint32_t span(int item, int consumer) const {
    return base + C::kSpans + ((item & 1) * C::kConsumers + consumer) * 8;
  }
  __device__ __forceinline__ std::uint32_t tile_full(int stage) const { return base + C::kBarriers + stage * 8; }
  __device__ __forceinline__ std::uint32_t tile_empty(int stage) const { return tile_full(C::kStages + stage); }
  __device__ __forceinline__ std::uint32_t queries_full(int consumer) const {
    return tile_full(2 * C::kStages + consumer);
  }
  __device__ __forceinline__ std::uint32_t queries_empty(int consumer) const {
    return queries_full(C::kConsumers + consumer);
  }
  __device__ __forceinline__ Limits load_limits(int item, int consumer, int row) const {
    std::uint32_t low, high;
    ptx::load_shared(limits(item, consumer, row), low, high);
    return {static_cast<int>(low), static_cast<int>(high)};
  }
  __device__ __forceinline__ Span load_span(int item, int consumer) const {
    std::uint32_t low, high;
    ptx::load_shared(span(item, consumer), low, high);
    return {uniform(static_cast<int>(low)), uniform(static_cast<int>(high))};
  }
};

}  // namespace moba::cuda::gating
