// A key warpgroup of backward_sm90.cu where a unit has up to 128 keys: S^T, dP^T, dV and dK of 64 of them.
#pragma once

#include <cstdint>

#include "cuda/backward_sm90_shared.cuh"
#include "cuda/backward_sm90_tile.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace moba::cuda::gradient {

// Order of a tile t: dV(t), dP(t); wait; dS(t); S(t + 1), dK(t); dS(t) to shared memory; wait for S(t + 1); P(t + 1)
// under dK(t). The next tile may be of the next unit, whose keys are in the other stage already. No product is in
// flight at a loop's head: ptxas serialises all of them if a loop carries one over. The first tiles of a unit whose
// rows see none of the group's keys take no part: dS is 0.
template <class T, class L>
__device__ __forceinline__ void multiply_keys(const Arguments& arguments, std::uint32_t base, const Unit* ring,
                                              int group) {
  constexpr int d = L::kHeadDim;
  const int t = threadIdx.x % kGroupThreads, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0), c = lane % 4;
  const int key = group * kGroupKeys + warp * 16 + lane / 4;
  const std::uint32_t group_keys = ptx::operand(base + group * kGroupKeys * kBandBytes);
  const std::uint32_t q_rows = ptx::operand(base + L::kQ), q_columns = ptx::operand(base + L::kQ, L::kTileBand);
  const std::uint32_t dout_rows = ptx::operand(base + L::kDO), dout_columns = ptx::operand(base + L::kDO, L::kTileBand);
  const int place = group * L::kTileBand + slopes_place(warp, lane);  // in a stage of dS
  float dk[d / 2], dv[d / 2], s[32];                                  // s: S^T, P^T, then dP^T
  std::uint32_t p[16], ds[16];

  // tiles 0: no more units. Tiles before blind_tiles see nothing, those from row mask_rows on all keys.
  int n = 0, tile = 0, tiles, blind_tiles, mask_rows;
  const auto wait_unit = [&] {
    ptx::barrier_wait(base + L::kKeyFull + (n & 1) * 8, (n >> 1) & 1);
    const Unit& unit = ring[n & 1];
    tiles = (unit.rows + kTileRows - 1) / kTileRows;
    mask_rows = rows_to_mask<L>(unit);
    blind_tiles = 0;
    if (mask_rows == 0) return;
    const int blind = blind_rows(arguments, unit, group * kGroupKeys);
    blind_tiles = blind == unit.rows ? tiles : blind / kTileRows;
  };
  Stage<L::kQStages> q(0);
  Stage<L::kDOStages> dout(0);
  Stage<L::kDSStages> stored(1);
  const auto terms = [&](int dout_stage) { return base + L::kTerms + dout_stage * L::kTermBytes; };
  const auto issue_scores = [&](int q_stage, std::uint32_t q_terms) {
    issue_transposed<T, L>(s, group_keys + (n & 1) * (L::kKeyStage / 16), q_rows + q_stage * (L::kTileBytes / 16),
                           base + L::kWeights, q_terms);
  };
  const auto issue_slopes = [&](int dout_stage) {
    issue_transposed<T, L>(s, group_keys + (n & 1) * (L::kKeyStage / 16) + L::kKeyBytes / 16,
                           dout_rows + dout_stage * (L::kTileBytes / 16), base + L::kWeights + L::kWeightBytes,
                           terms(dout_stage));
  };
  const auto finish_weights = [&] {
    weigh(s, arguments.factor);
    if (tile * kTileRows < mask_rows) mask_weights(s, arguments, ring[n & 1], key, tile * kTileRows + 2 * c);
  };
  // Unit n - 1 has ended. Every lane arrives, for every lane has read the unit.
  const auto finish_unit = [&] {
    const Unit unit = ring[(n - 1) & 1];
    ptx::barrier_arrive(base + L::kKeyEmpty + ((n - 1) & 1) * 8);
    ptx::pin(dk);
    ptx::pin(dv);
    store_sum<Sum::dk, T, L>(arguments, unit, key, dk);
    store_sum<Sum::dv, T, L>(arguments, unit, key, dv);
  };
  const auto pass_tile = [&] {
    ptx::barrier_wait(base + L::kQFull + q.number * 8, q.parity);
    ptx::barrier_wait(base + L::kDOFull + dout.number * 8, dout.parity);
    __syncwarp();  // all lanes have seen both
    ptx::barrier_arrive_if(lane == 0, base + L::kQEmpty + q.number * 8);
    ptx::barrier_arrive_if(lane == 0, base + L::kDOEmpty + dout.number * 8);
    q.next();
    dout.next();
#pragma unroll
    for (std::uint32_t& pair : ds) pair = 0;
    store_slopes<L>(base, place, stored, ds);
  };

  // Works from tile `tile` of unit n to the end of the unit, and on through units that begin with tiles to work on.
  const auto work = [&] {
    ptx::barrier_wait(base + L::kQFull + q.number * 8, q.parity);
    ptx::fence_async_proxy();
    issue_scores(q.number, terms(dout.number));
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    finish_weights();
    pack_weights<T>(p, s);
    bool goes_on;  // with the next tile
    do {
      const int q_stage = q.number, dout_stage = dout.number;
      const bool accumulate = tile > blind_tiles;
      ptx::barrier_wait(base + L::kDOFull + dout_stage * 8, dout.parity);
      ptx::fence_async_proxy();
      issue_sum<T>(dv, p, dout_columns + dout_stage * (L::kTileBytes / 16), accumulate);
      issue_slopes(dout_stage);
      q.next();
      dout.next();
      if (++tile == tiles) {
        tile = 0, ++n;
        wait_unit();
      }
      goes_on = tile > 0 || (tiles > 0 && blind_tiles == 0);
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      ptx::barrier_arrive_if(lane == 0, base + L::kDOEmpty + dout_stage * 8);
      slopes<T>(ds, p, s);
      if (goes_on) ptx::barrier_wait(base + L::kQFull + q.number * 8, q.parity);
      // Where it does not go on, weights that nobody reads: of the tile in hand, which also stands in for its terms,
      // for those are given back.
      const int next_stage = goes_on ? q.number : q_stage;
      const std::uint32_t next_terms = goes_on ? terms(dout.number) : base + L::kQ + q_stage * L::kTileBytes;
      ptx::fence_async_proxy();
      issue_scores(next_stage, next_terms);
      issue_sum<T>(dk, ds, q_columns + q_stage * (L::kTileBytes / 16), accumulate);
      store_slopes<L>(base, place, stored, ds);
      ptx::wgmma_wait<1>();
      ptx::pin(s);
      finish_weights();
      ptx::wgmma_wait<0>();
      pack_weights<T>(p, s);  // into the registers that dV read
      ptx::barrier_arrive_if(lane == 0, base + L::kQEmpty + q_stage * 8);
      if (tile == 0) finish_unit();
    } while (goes_on);
  };
  // A unit whose rows see none of the group's keys.
  const auto leave_out = [&] {
#pragma unroll
    for (int i = 0; i < d / 2; ++i) dk[i] = dv[i] = 0;
    ++n;
    finish_unit();
    tile = 0;
    wait_unit();
  };

  wait_unit();
  while (tiles > 0) {
    for (; tile < blind_tiles; ++tile) pass_tile();
    if (tile < tiles) {
      work();
    } else {
      leave_out();
    }
  }
}

}  // namespace moba::cuda::gradient
