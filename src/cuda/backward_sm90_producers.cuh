// The producer warpgroup of backward_sm90.cu: takes units, brings their K and V, gathers Q, dO and the terms of their
// rows. A tile is computed in about the time in which it is gathered, so nothing here may wait for memory: units are
// read one unit before their use, row ids one tile.
#pragma once

#include <cstdint>

#include "cuda/backward_sm90_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/resident_keys.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::gradient {

template <int d>
__device__ __forceinline__ void produce(const CUtensorMap& k_map, const CUtensorMap& v_map, const Arguments& arguments,
                                        std::uint32_t base, Unit* ring) {
  using L = Layout<d>;
  constexpr int kLanes = d / 8;        // that bring one row, 16 bytes each
  constexpr int kRows = 32 / kLanes;   // that a warp brings in one pass
  constexpr int kPasses = 16 / kRows;  // a warp's 16 rows of a tile: rows 4 kRows p + kRows w + 0, 1 ... of pass p
  const int t = threadIdx.x % kProducers, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0);
  // Lanes i and i + 16 hold the i-th row of a warp.
  const int held = lane % 16 / kRows * 4 * kRows + warp * kRows + lane % kRows;
  const std::uint32_t to = base + swizzled_band(kTileRows, t / kLanes, t % kLanes);
  const std::uint32_t terms_to = base + L::kTerms + held * 16;
  const auto row_id = [&](const Unit& unit, int row) {
    const int i = min(row + held, unit.rows - 1);
    return arguments.rows == nullptr ? unit.row0 + i : __ldg(arguments.rows + unit.first + i);
  };
  const auto key_head_rows = [&](const RowAddresses& rows, const Unit& unit) {
    return rows.data + unit.head * rows.key_head_bytes + t % kLanes * 16;
  };
  // This thread's chunks of a tile, when `empty` says so. The lane that holds a row has its place, counted in `unit`
  // bytes from `from`.
  const auto gather = [&](std::uint32_t tile, const char* from, std::uint32_t place, std::uint32_t unit,
                          std::uint32_t empty, int parity) {
    std::uint32_t places[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) places[p] = __shfl_sync(kAllLanes, place, kRows * p + lane / kLanes);
    ptx::barrier_wait(empty, parity);
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      ptx::copy_async(to + tile + p * 4 * kRows * kBandBytes, from + static_cast<std::uint64_t>(places[p]) * unit);
    }
  };

  DrawnUnits<L> drawn(arguments.keys, t, warp);
  take_unit<L>(k_map, v_map, arguments.keys, base, ring, 0, drawn.word());
  Stage<L::kQStages> q(1);
  Stage<L::kDOStages> dout(1);
  int next = ring[0].rows > 0 ? row_id(ring[0], 0) : 0;
  for (int n = 0; ring[n & 1].rows > 0; ++n) {
    const Unit& unit = ring[n & 1];
    const Unit& next_unit = ring[(n + 1) & 1];
    drawn.advance();
    const char *q_from = key_head_rows(arguments.q, unit), *dout_from = key_head_rows(arguments.dout, unit);
    const uint4* unit_terms = arguments.terms + (unit.head * arguments.head_terms - arguments.first_term);
    // The next unit is asked for when its stage is, as a rule, free.
    const int tiles = (unit.rows + kTileRows - 1) / kTileRows, ask = min(tiles - 1, 2);
    for (int tile = 0; tile < tiles; ++tile) {
      const bool is_last = tile + 1 == tiles, is_row = tile * kTileRows + held < unit.rows;
      const int row = next, token = arguments.by_group(row);
      if (!is_last) next = row_id(unit, (tile + 1) * kTileRows);
      if (is_last && tile > ask && next_unit.rows > 0) next = row_id(next_unit, 0);
      gather(L::kQ + q.number * L::kTileBytes, q_from, arguments.q.units_of(row, token), arguments.q.unit,
             base + L::kQEmpty + q.number * 8, q.parity);
      ptx::barrier_wait(base + L::kDOEmpty + dout.number * 8, dout.parity);  // of the tile of dO and the terms
      if (lane < 16) {
        ptx::copy_async(terms_to + dout.number * L::kTermBytes,
                        is_row ? unit_terms + row : arguments.terms + arguments.no_row);
      }
      ptx::copy_async_arrive(base + L::kQFull + q.number * 8);
      q.next();
      gather(L::kDO + dout.number * L::kTileBytes, dout_from, arguments.dout.units_of(row, token), arguments.dout.unit,
             base + L::kDOEmpty + dout.number * 8, dout.parity);
      ptx::copy_async_arrive(base + L::kDOFull + dout.number * 8);
      dout.next();
      if (tile != ask) continue;
      take_unit<L>(k_map, v_map, arguments.keys, base, ring, n + 1, drawn.word());
      if (is_last && next_unit.rows > 0) next = row_id(next_unit, 0);
    }
  }
  ptx::copy_async_wait_all();
}

}  // namespace moba::cuda::gradient
