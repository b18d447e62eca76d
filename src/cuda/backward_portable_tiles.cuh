// What the pieces of backward_portable.cu share: how everything stands in shared memory, how it gets there, and how a
// CTA comes by its units.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attend_portable_tiles.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/swizzle.cuh"
#include "cuda/visible_keys.cuh"

namespace moba::cuda::portable_backward {

using portable::at_pair;
using portable::kOptional;
using portable::kThreads;
using portable::kWarps;

struct Arguments {
  BackwardInput input;
  BackwardOutput output;
  UnitList units;
  Slab slab;
  int head_dim, group;
  float scale, scale_log2e;
  Divide by_group;
};

// A tile: kRows rows against the kKeys keys of a part; kDim >= head_dim columns, of which those behind head_dim are
// never touched. What each of the four warps has of a product:
//   S, dP    kScoreRows rows at a time by kScoreKeys keys
//   dV, dK   32 keys by kColumns columns, which stay in registers: 2 * 32 * kColumns floats
//   dQ       32 rows by 32 columns at a time
template <class Element, int dim, int keys>
struct Tiles {
  using T = Element;
  static constexpr int kDim = dim, kKeys = keys;
  static constexpr int kRows = kDim <= 128 ? 64 : 32;
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kWeightBytes = kKeys <= 64 ? 128 : 2 * kKeys;  // of a row of P or dS

  static constexpr int kScoreKeys = kKeys >= 64 ? 32 : 16;
  static constexpr int kScoreKeyGroups = kKeys / kScoreKeys;
  static constexpr int kWarpRows = kRows * kScoreKeyGroups / kWarps;
  static constexpr int kScoreRows = kWarpRows < 32 ? kWarpRows : 32;

  static constexpr int kKeyGroups = kKeys / 32;
  static constexpr int kColumns = kDim * kKeyGroups / kWarps;

  static constexpr int kRowGroups = kRows / 32;

  struct alignas(128) Shared {
    T k[kKeys * kDim], v[kKeys * kDim], q[kRows * kDim], dout[kRows * kDim];
    unsigned char p[kRows * kWeightBytes], ds[kRows * kWeightBytes];
    float lse[kRows], delta[kRows];
    int limit[kRows];  // keys that a row sees
    Unit units[2];     // this one and the next; no rows: the end
  };
  static_assert(kColumns == 32 || kColumns == 64);
  static_assert(sizeof(Shared) <= 81 * 1024);  // two CTAs, 1 KB more each, on an SM of sm_80, which has 164
};

// The keys of a unit, or their values, zeros behind them.
template <class L>
__device__ __forceinline__ void copy_part(std::uint32_t to, const View<const void>& view, const Unit& unit,
                                          int head_dim) {
  using Share = portable::Share<L::kDim>;
  const Share share;
  if (share.chunk * 8 >= head_dim) return;
  const auto* from = static_cast<const typename L::T*>(view.data) +
                     (std::int64_t{unit.key_begin} + share.row) * view.token_stride + unit.head * view.head_stride +
                     share.chunk * 8;
  const std::int64_t step = Share::kStep * view.token_stride;
  const std::uint32_t first = to + swizzled(L::kRowBytes, share.row, share.chunk);
#pragma unroll
  for (int i = 0; i < L::kKeys / Share::kStep; ++i, from += step) {
    ptx::copy_async(Share::at_step(first, i), from, share.row + i * Share::kStep < unit.keys ? 16 : 0);
  }
}

// The rows of the next tile, kRows / 4 to a warp, which copies kAtOnce of them at a time, kTimes times, kChunks lanes a
// row. Of those rows that a lane copies a chunk of, it looks after one: its id, found early, then what comes with it.
template <class L>
class NextRows {
 public:
  using Shared = typename L::Shared;

  __device__ NextRows(const Arguments& arguments, Shared& shared) : p_(arguments), s_(shared) {}

  // Rows from number `begin` of the unit on.
  __device__ __forceinline__ void find(const Unit& unit, int begin) {
    const int i = min(begin + mine(), unit.rows - 1);
    id_ = p_.input.rows != nullptr ? __ldg(p_.input.rows + unit.first + i) : unit.row0 + i;
  }

  // Starts the copies of q and dout; zeros for rows behind the unit.
  __device__ __forceinline__ void copy(const Unit& unit, int begin) const {
    const int chunk = lane() % kChunks, row = lane() / kChunks;
    int ids[kTimes];
#pragma unroll
    for (int i = 0; i < kTimes; ++i) ids[i] = __shfl_sync(kAllLanes, id_, i, kChunks);
    if (chunk * 8 >= p_.head_dim) return;
    const int place = swizzled(L::kRowBytes, first() + row, chunk);
    const std::uint32_t q = ptx::shared_address(s_.q) + place, dout = ptx::shared_address(s_.dout) + place;
    const int left = unit.rows - begin - first() - row;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int token = p_.by_group(ids[i]), head = unit.head * p_.group + ids[i] - token * p_.group;
      const int bytes = i * kAtOnce < left ? 16 : 0;
      ptx::copy_async(at_step(q, i * kAtOnce), row_of(p_.input.q, token, head) + chunk * 8, bytes);
      ptx::copy_async(at_step(dout, i * kAtOnce), row_of(p_.input.dout, token, head) + chunk * 8, bytes);
    }
  }

  // Starts the loads of what store_values() writes.
  __device__ __forceinline__ void load_values(const Unit& unit, int begin) {
    const int i = begin + mine();
    lse_ = INFINITY;
    delta_ = 0.0f;
    limit_ = 0;
    if (i >= unit.rows) return;
    const std::int64_t at = static_cast<std::int64_t>(unit.head - p_.slab.head_begin) * p_.slab.tokens * p_.group +
                            (id_ - p_.slab.token_begin * p_.group);
    lse_ = __ldg(p_.input.values.lse + at);
    delta_ = __ldg(p_.input.values.delta + at);
    limit_ = i < unit.masked ? keys_up_to(unit, p_.by_group(id_)) : unit.keys;
  }

  __device__ __forceinline__ void store_values() const {
    if (lane() % kChunks >= kTimes) return;
    s_.lse[mine()] = lse_;
    s_.delta[mine()] = delta_;
    s_.limit[mine()] = lse_ == INFINITY ? 0 : limit_;  // sees nothing, whatever its scores are
  }

 private:
  static constexpr int kWarpRows = L::kRows / kWarps;
  static constexpr int kChunks = L::kDim / 8, kAtOnce = 32 / kChunks, kTimes = kWarpRows / kAtOnce;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int first() { return static_cast<int>(threadIdx.x) / 32 * kWarpRows; }
  __device__ static int mine() { return first() + lane() % kChunks % kTimes * kAtOnce + lane() / kChunks; }

  // The place of the same chunk `rows` rows on, where their number has no bit in common with that of the first row.
  __device__ static std::uint32_t at_step(std::uint32_t place, int rows) {
    return (place ^ static_cast<std::uint32_t>(rows % 8 << 4)) + static_cast<std::uint32_t>(rows * L::kRowBytes);
  }

  __device__ static const typename L::T* row_of(const View<const void>& view, int token, int head) {
    return static_cast<const typename L::T*>(view.data) + token * view.token_stride + head * view.head_stride;
  }

  const Arguments& p_;
  Shared& s_;
  int id_ = 0, limit_ = 0;
  float lse_ = 0, delta_ = 0;
};

// The units of a CTA, by ticket, one after the other: take(), fetch(), turn(), in this order, with a synchronisation
// after fetch() has landed. Thread 0 takes and fetches.
class Units {
 public:
  __device__ Units(const UnitList& list, Unit (&units)[2]) : list_(list), units_(units), count_(list.counters[1]) {}

  __device__ const Unit& current() const { return units_[turn_]; }
  __device__ const Unit& next() const { return units_[turn_ ^ 1]; }

  __device__ void take() {
    if (threadIdx.x == 0) ticket_ = atomicAdd(list_.counters, 1);
  }
  __device__ void fetch() {
    if (threadIdx.x != 0) return;
    Unit& to = units_[turn_ ^ 1];
    if (ticket_ >= count_) {
      to.rows = 0;
      return;
    }
    const char* from = reinterpret_cast<const char*>(list_.units + ticket_);
    const std::uint32_t address = ptx::shared_address(&to);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Unit) / 16); ++i) ptx::copy_async(address + 16 * i, from + 16 * i);
  }
  __device__ void turn() { turn_ ^= 1; }

 private:
  const UnitList& list_;
  Unit (&units_)[2];
  int count_;
  int turn_ = 0, ticket_ = 0;
};

}  // namespace moba::cuda::portable_backward
