// The producer warpgroup of attend_resident_sm90.cu: takes units, brings their K and V, gathers their Q.
//
// Its first warp waits for a free stage of K and V and puts the next unit into the ring; then all four ask for the keys
// (the copy engine, or cp.async where the unit has fewer than kKeys). Each thread waits for a free stage of Q by itself
// and brings its 16-byte chunks of the tile. What is far away, tickets, units and row ids, is read well before its use.
#pragma once

#include <cstdint>

#include "cuda/attend_resident_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/resident_keys.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::resident {

inline constexpr int kTilesAhead = 4;  // between the load of a row id and its use: less than its latency is seen

template <int d, int kKeys>
__device__ __forceinline__ void produce(const CUtensorMap& k_map, const CUtensorMap& v_map, const Arguments& arguments,
                                        std::uint32_t base, Unit* ring) {
  using L = Layout<d, kKeys>;
  constexpr int kLanes = d / 8;        // that bring one row, 16 bytes each
  constexpr int kRows = 32 / kLanes;   // that a warp brings in one pass
  constexpr int kPasses = 16 / kRows;  // a warp's 16 rows of a tile: rows 4 kRows p + kRows w + 0, 1 ... of pass p
  const int t = threadIdx.x % kProducers, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0);
  // A lane holds one row of an even (lanes 0 to 15) or odd tile, so that two registers hold four tiles.
  const int held = lane / 16 * kTileRows + lane % 16 / kRows * 4 * kRows + warp * kRows + lane % kRows;
  const std::uint32_t to = base + L::kQ + swizzled_band(kTileRows, t / kLanes, t % kLanes);
  const auto units_of = [&](int row) { return arguments.q.units_of(row, arguments.by_group(row)); };

  const auto load = [&](const Unit& unit, int row) {
    return __ldg(arguments.rows + unit.first + min(row + held, unit.rows - 1));
  };

  DrawnUnits<L> drawn(arguments.keys, t, warp);
  take_unit<L>(k_map, v_map, arguments.keys, base, ring, 0, drawn.word());
  if (ring[0].rows == 0) return;
  std::uint32_t now[2] = {units_of(load(ring[0], 0)), units_of(load(ring[0], 2 * kTileRows))};
  int stage = 0, parity = 1;
  for (int n = 0; ring[n & 1].rows > 0; ++n) {
    const Unit& unit = ring[n & 1];
    const Unit& next_unit = ring[(n + 1) & 1];
    const int tiles = L::tiles(unit.rows);
    // The next unit is asked for when its stage is, as a rule, free; never before the first tile of each consumer is
    // here, or it would wait for consumers that wait for their tile.
    const int ask = min(tiles, L::kQStages + 2);
    drawn.advance();
    const char* from = arguments.q.data + unit.head * arguments.q.key_head_bytes + t % kLanes * 16;
    for (int tile = 0; tile < tiles; tile += kTilesAhead) {
      const bool last = tile + kTilesAhead >= tiles, asks = tile < ask && tile + kTilesAhead >= ask;
      int later[2] = {0, 0};
      const auto load_later = [&](const Unit& of, int row) {
        if (of.rows > 0) later[0] = load(of, row), later[1] = load(of, row + 2 * kTileRows);
      };
      if (!last) {
        load_later(unit, (tile + kTilesAhead) * kTileRows);
      } else if (!asks) {
        load_later(next_unit, 0);
      }
#pragma unroll
      for (int u = 0; u < kTilesAhead; ++u) {
        if (tile + u < tiles) {
          std::uint32_t units[kPasses];  // known before the wait, so that the copies follow it at once
#pragma unroll
          for (int p = 0; p < kPasses; ++p) {
            units[p] = __shfl_sync(kAllLanes, now[u / 2], u % 2 * 16 + kRows * p + lane / kLanes);
          }
          ptx::barrier_wait(base + L::kQEmpty + stage * 8, parity);
#pragma unroll
          for (int p = 0; p < kPasses; ++p) {
            ptx::copy_async(to + stage * L::kQBytes + p * 4 * kRows * kBandBytes,
                            from + static_cast<std::uint64_t>(units[p]) * arguments.q.unit);
          }
          ptx::copy_async_arrive(base + L::kQFull + stage * 8);
          if (++stage == L::kQStages) stage = 0, parity ^= 1;
        }
      }
      if (asks) {
        take_unit<L>(k_map, v_map, arguments.keys, base, ring, n + 1, drawn.word());
        if (last) load_later(next_unit, 0);
      }
      now[0] = units_of(later[0]), now[1] = units_of(later[1]);
    }
  }
  ptx::copy_async_wait_all();
}

}  // namespace moba::cuda::resident
