// The producer warpgroup of backward_sm90.cu: takes units, brings their K and V, gathers Q, dO and the values of their
// rows. With 24 registers a thread it keeps little: a row id is read one tile before its use.
#pragma once

#include <cstdint>

#include "cuda/backward_sm90_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/resident_keys.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::gradient {

// This thread's 16-byte chunks of a tile to `to`. Lane i of the warp has the place, in `unit` bytes behind `from`, of
// the row that it holds; see produce().
template <int d>
__device__ __forceinline__ void gather(std::uint32_t to, const char* from, std::uint32_t place, std::uint32_t unit) {
  constexpr int kLanes = d / 8, kRows = 32 / kLanes, kPasses = 16 / kRows;
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const std::uint32_t row = __shfl_sync(kAllLanes, place, kRows * p + threadIdx.x % 32 / kLanes);
    ptx::copy_async(to + p * 4 * kRows * kBandBytes, from + static_cast<std::uint64_t>(row) * unit);
  }
}

template <int d>
__device__ __forceinline__ void produce(const CUtensorMap& k_map, const CUtensorMap& v_map, const Arguments& arguments,
                                        std::uint32_t base, Unit* ring) {
  using L = Layout<d>;
  constexpr int kLanes = d / 8;       // that bring one row, 16 bytes each
  constexpr int kRows = 32 / kLanes;  // that a warp brings in one pass
  const int t = threadIdx.x % kProducers, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0);
  // A warp brings 16 rows of a tile, rows 4 kRows p + kRows w + 0, 1 ... in pass p; lanes i and i + 16 hold the i-th.
  const int held = lane % 16 / kRows * 4 * kRows + warp * kRows + lane % kRows;
  const std::uint32_t to = base + swizzled_band(kTileRows, t / kLanes, t % kLanes);
  const auto row_id = [&](const Unit& unit, int row) {
    const int i = min(row + held, unit.rows - 1);
    return arguments.rows == nullptr ? unit.row0 + i : __ldg(arguments.rows + unit.first + i);
  };

  int ticket = 0, word = 0;  // of the unit behind the next; of the next
  if (t == 0) ticket = atomicAdd(arguments.keys.counters, 1);
  if (warp == 0) word = unit_word<L>(arguments.keys, ticket);
  take_unit<L>(k_map, v_map, arguments.keys, base, ring, 0, word);
  Stage<L::kQStages> q(1);
  Stage<L::kDOStages> dout(1);
  int next = ring[0].rows > 0 ? row_id(ring[0], 0) : 0;
  for (int n = 0; ring[n & 1].rows > 0; ++n) {
    const Unit& unit = ring[n & 1];
    if (t == 0) ticket = atomicAdd(arguments.keys.counters, 1);
    // The next unit is asked for when its stage is, as a rule, free.
    const int tiles = (unit.rows + kTileRows - 1) / kTileRows, ask = min(tiles - 1, 2);
    for (int tile = 0; tile < tiles; ++tile) {
      const int row = next, token = arguments.by_group(row);
      if (tile + 1 < tiles) next = row_id(unit, (tile + 1) * kTileRows);
      const std::uint32_t q_place = arguments.q.units_of(row, token), dout_place = arguments.dout.units_of(row, token);
      ptx::barrier_wait(base + L::kQEmpty + q.number * 8, q.parity);
      gather<d>(to + L::kQ + q.number * L::kTileBytes,
                arguments.q.data + unit.head * arguments.q.key_head_bytes + t % kLanes * 16, q_place, arguments.q.unit);
      if (lane < 16) {
        const bool is_row = tile * kTileRows + held < unit.rows;
        const std::int64_t value =
            is_row ? unit.head * arguments.head_values + row - arguments.first_value : arguments.no_row;
        const std::uint32_t values = base + L::kValues + q.number * L::kValueBytes + held * 4;
        ptx::copy_async_4(values, arguments.lse + value);
        ptx::copy_async_4(values + kTileRows * 4, arguments.delta + value);
      }
      ptx::copy_async_arrive(base + L::kQFull + q.number * 8);
      q.next();
      ptx::barrier_wait(base + L::kDOEmpty + dout.number * 8, dout.parity);
      gather<d>(to + L::kDO + dout.number * L::kTileBytes,
                arguments.dout.data + unit.head * arguments.dout.key_head_bytes + t % kLanes * 16, dout_place,
                arguments.dout.unit);
      ptx::copy_async_arrive(base + L::kDOFull + dout.number * 8);
      dout.next();
      if (tile == ask) {
        if (warp == 0) word = unit_word<L>(arguments.keys, ticket);
        take_unit<L>(k_map, v_map, arguments.keys, base, ring, n + 1, word);
      }
    }
    const Unit& after = ring[(n + 1) & 1];
    if (after.rows > 0) next = row_id(after, 0);
  }
  ptx::copy_async_wait_all();
}

}  // namespace moba::cuda::gradient
