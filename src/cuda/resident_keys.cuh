// How kernels that keep a unit's keys in shared memory come by them: units by ticket into a ring of two, their K and V
// into the stage of the same number. Both are taken by a producer warpgroup, all threads of which call take_unit().
//
// L, the layout of such a kernel, has kHeadDim, kKeys (a stage's), kKeyStage (bytes of one: K in bands of 64 columns
// [kKeys, 128 bytes], then V), kKeyFull and kKeyEmpty (barriers of the two stages). Behind the last unit comes one of 0
// rows.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "cuda/contract.h"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda {

inline constexpr int kProducers = 128;  // threads
inline constexpr int kProducerBarrier = 1;

struct KeySource {
  const Unit* units;
  std::int32_t* counters;
  const char *k, *v;  // for units of fewer than kKeys keys
  std::int64_t k_token_bytes, k_head_bytes, v_token_bytes, v_head_bytes;
};

inline KeySource key_source(const UnitList& list, const View<const void>& k, const View<const void>& v) {
  constexpr int kElementBytes = 2;
  return {.units = list.units,
          .counters = list.counters,
          .k = static_cast<const char*>(k.data),
          .v = static_cast<const char*>(v.data),
          .k_token_bytes = k.token_stride * kElementBytes,
          .k_head_bytes = k.head_stride * kElementBytes,
          .v_token_bytes = v.token_stride * kElementBytes,
          .v_head_bytes = v.head_stride * kElementBytes};
}

// The unit's keys from `from` on to shared memory at `to`, zeros behind them: the rows of memory there belong to other
// blocks or sequences, and a NaN of theirs would pass through the product with a weight of 0.
template <class L>
__device__ __forceinline__ void copy_short_keys(std::uint32_t to, const char* from, std::int64_t token_bytes,
                                                int keys) {
  constexpr int kChunks = L::kHeadDim / 8;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll 2
  for (int row = threadIdx.x % kProducers / kChunks; row < L::kKeys; row += kProducers / kChunks) {
    ptx::copy_async(to + swizzled_band(L::kKeys, row, chunk), from + min(row, keys - 1) * token_bytes + chunk * 16,
                    row < keys ? 16 : 0);
  }
}

// The units of this CTA, drawn by ticket. One travels from the list to the ring in a register: word i of it in lane i
// of the producers' first warp, read while the unit before is gathered.
template <class L>
class DrawnUnits {
 public:
  // `t`, `warp`: number of the thread and of its warp among the producers, the latter known to be the same in all of
  // it.
  __device__ __forceinline__ DrawnUnits(const KeySource& source, int t, int warp)
      : source_(source), count_(source.counters[1]), t_(t), warp_(warp) {
    draw();
    advance();
  }
  // Reads the unit of the ticket in hand, and draws the next.
  __device__ __forceinline__ void advance() {
    if (warp_ == 0) word_ = read();
    draw();
  }
  // Of the unit read last, at first the first.
  __device__ __forceinline__ int word() const { return word_; }

 private:
  __device__ __forceinline__ void draw() {
    if (t_ == 0) ticket_ = atomicAdd(source_.counters, 1);
  }
  __device__ __forceinline__ int read() const {
    constexpr int kWords = sizeof(Unit) / 4, kRowsWord = offsetof(Unit, rows) / 4;
    const int lane = threadIdx.x % 32, ticket = __shfl_sync(kAllLanes, ticket_, 0);
    if (ticket >= count_) return lane == kRowsWord ? 0 : L::kKeys;
    return reinterpret_cast<const int*>(source_.units + ticket)[min(lane, kWords - 1)];
  }

  const KeySource& source_;
  int count_, t_, warp_, ticket_ = 0, word_ = 0;
};

// Puts unit n of this CTA, by the words of the first warp, into the ring when its stage is free, and asks for its keys:
// the copy engine, or, where the unit has fewer than kKeys, cp.async. The barrier `full` counts kProducers + 1.
template <class L>
__device__ __forceinline__ void take_unit(const CUtensorMap& k_map, const CUtensorMap& v_map, const KeySource& source,
                                          std::uint32_t base, Unit* ring, int n, int word) {
  constexpr int kBytes = L::kKeyStage / 2;  // of K or V
  const int stage = n & 1, t = threadIdx.x % kProducers;
  const bool first_thread = t == 0;
  const std::uint32_t full = base + L::kKeyFull + stage * 8;
  if (t < 32) {
    ptx::barrier_wait(base + L::kKeyEmpty + stage * 8, ((n >> 1) & 1) ^ 1);
    if (t < static_cast<int>(sizeof(Unit) / 4)) reinterpret_cast<int*>(ring + stage)[t] = word;
  }
  ptx::named_barrier(kProducerBarrier, kProducers);
  const Unit& unit = ring[stage];
  const std::uint32_t k = base + stage * L::kKeyStage, v = k + kBytes;
  if (unit.keys < L::kKeys) {
    const std::int64_t token = unit.key_begin, head = unit.head;
    copy_short_keys<L>(k, source.k + token * source.k_token_bytes + head * source.k_head_bytes, source.k_token_bytes,
                       unit.keys);
    copy_short_keys<L>(v, source.v + token * source.v_token_bytes + head * source.v_head_bytes, source.v_token_bytes,
                       unit.keys);
    ptx::copy_async_arrive(full);
    if (first_thread) ptx::barrier_arrive(full);  // publishes the ring too, which arrival by cp.async need not do
    return;
  }
  ptx::barrier_arrive(full);
  if (!first_thread) return;
  ptx::barrier_arrive_expect(full, unit.rows > 0 ? L::kKeyStage : 0);
  if (unit.rows == 0) return;
#pragma unroll
  for (int band = 0; band < L::kHeadDim / kBandColumns; ++band) {
    const int column = band * kBandColumns, offset = band * L::kKeys * kBandBytes;
    ptx::copy_tensor_3d(k + offset, &k_map, full, column, unit.head, unit.key_begin);
    ptx::copy_tensor_3d(v + offset, &v_map, full, column, unit.head, unit.key_begin);
  }
}

}  // namespace moba::cuda
