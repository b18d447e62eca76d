// The key warpgroups of backward_sm90.cu where a unit has up to 64 keys. Both have all of them, and share the work by
// what it is: multiply_weights() computes S^T and dV, multiply_slopes() dP^T and dK. P^T goes from the one to the other
// through shared memory, packed: what is in a thread's registers to the thread of the same number.
#pragma once

#include <cstdint>

#include "cuda/backward_sm90_shared.cuh"
#include "cuda/backward_sm90_tile.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace moba::cuda::gradient {

// P^T in shared memory: 16 words of each thread, 4 at a time.
inline constexpr int kPStep = kGroupThreads * 16;
inline constexpr int kPThreads = 2 * kGroupThreads;  // of its named barriers

// Where a warpgroup is: tile `tile` of `tiles` of unit n, in stages q and dout of the rings. tiles 0: no more units.
template <class L>
struct Position {
  const Arguments& arguments;
  const std::uint32_t base;
  const Unit* const ring;
  int n = 0, tile = 0, tiles;
  Stage<L::kQStages> q;
  Stage<L::kDOStages> dout;

  __device__ __forceinline__ Position(const Arguments& of, std::uint32_t shared, const Unit* units)
      : arguments(of), base(shared), ring(units), q(0), dout(0) {
    wait_unit();
  }
  __device__ __forceinline__ const Unit& unit() const { return ring[n & 1]; }
  __device__ __forceinline__ void next_tile() {
    if (++tile < tiles) return;
    tile = 0, ++n;
    wait_unit();
  }
  __device__ __forceinline__ void wait_q() const { ptx::barrier_wait(base + L::kQFull + q.number * 8, q.parity); }
  __device__ __forceinline__ void wait_dout() const {
    ptx::barrier_wait(base + L::kDOFull + dout.number * 8, dout.parity);
  }
  // The tiles in hand, and the terms of their rows.
  __device__ __forceinline__ std::uint32_t q_tile() const { return base + L::kQ + q.number * L::kTileBytes; }
  __device__ __forceinline__ std::uint32_t dout_tile() const { return base + L::kDO + dout.number * L::kTileBytes; }
  __device__ __forceinline__ std::uint32_t terms() const { return base + L::kTerms + dout.number * L::kTermBytes; }
  __device__ __forceinline__ std::uint32_t k() const { return ptx::operand(base) + (n & 1) * (L::kKeyStage / 16); }
  __device__ __forceinline__ std::uint32_t v() const { return k() + L::kKeyBytes / 16; }

  // Unit n - 1 has ended: it may be overwritten. Every lane arrives, for every lane has read it.
  __device__ __forceinline__ Unit release_unit() const {
    const Unit ended = ring[(n - 1) & 1];
    ptx::barrier_arrive(base + L::kKeyEmpty + ((n - 1) & 1) * 8);
    return ended;
  }

 private:
  __device__ __forceinline__ void wait_unit() {
    ptx::barrier_wait(base + L::kKeyFull + (n & 1) * 8, (n >> 1) & 1);
    tiles = (unit().rows + kTileRows - 1) / kTileRows;
  }
};

// Order of a tile t: P(t) to shared memory; S(t + 1), dV(t); wait for S(t + 1); P(t + 1) under dV(t), but packed behind
// it, into the registers that it read. As everywhere in this kernel no product is in flight at a loop's head. Behind
// the last tile come scores that nobody reads, of what is at hand: as rows and terms the tile of dO, as keys what is
// there.
template <class T, class L>
__device__ __forceinline__ void multiply_weights(const Arguments& arguments, std::uint32_t base, const Unit* ring) {
  const int t = threadIdx.x % kGroupThreads, lane = t % 32, key = t / 32 * 16 + lane / 4;
  const std::uint32_t to = base + L::kP + t * 16;
  float dv[L::kHeadDim / 2], s[32];  // s: S^T, then P^T
  std::uint32_t p[16];
  Position<L> at(arguments, base, ring);
  const auto issue_scores = [&](std::uint32_t rows, std::uint32_t terms) {
    ptx::fence_async_proxy();
    issue_transposed<T, L>(s, at.k(), ptx::operand(rows), base + L::kWeights, terms);
  };
  const auto finish_weights = [&] {
    weigh(s, arguments.factor);
    const Unit& unit = at.unit();
    const int row = at.tile * kTileRows;
    if (row < rows_to_mask<L>(unit)) mask_weights(s, arguments, unit, key, row + 2 * (lane % 4));
  };
  const auto hand_over_weights = [&] {
    ptx::named_barrier(kPEmpty, kPThreads);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::store_shared(to + j * kPStep, p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]);
    }
    ptx::named_barrier_arrive(kPFull, kPThreads);
  };

  if (at.tiles == 0) return;
  at.wait_q();
  issue_scores(at.q_tile(), at.terms());
  ptx::wgmma_wait<0>();
  ptx::pin(s);
  ptx::barrier_arrive_if(lane == 0, base + L::kQEmpty + at.q.number * 8);
  at.q.next();
  finish_weights();
  pack_weights<T>(p, s);
  bool goes_on;  // with the next tile
  do {
    hand_over_weights();
    const std::uint32_t dout_tile = at.dout_tile(), dout_empty = base + L::kDOEmpty + at.dout.number * 8;
    const bool accumulate = at.tile > 0;
    at.wait_dout();
    at.dout.next();
    at.next_tile();
    goes_on = at.tiles > 0;
    if (goes_on) at.wait_q();
    issue_scores(goes_on ? at.q_tile() : dout_tile, goes_on ? at.terms() : dout_tile);
    issue_sum<T>(dv, p, ptx::operand(dout_tile, L::kTileBand), accumulate);
    ptx::wgmma_wait<1>();
    ptx::pin(s);
    ptx::barrier_arrive_if(goes_on && lane == 0, base + L::kQEmpty + at.q.number * 8);
    at.q.next();
    finish_weights();
    ptx::wgmma_wait<0>();
    pack_weights<T>(p, s);
    ptx::barrier_arrive_if(lane == 0, dout_empty);
    if (at.tile == 0) {
      ptx::pin(dv);
      store_sum<Sum::dv, T, L>(arguments, at.release_unit(), key, dv);
    }
  } while (goes_on);
  ptx::named_barrier(kPEmpty, kPThreads);  // takes the arrival for the last tile: a CTA leaves none behind
}

// Order of a tile t: dP(t + 1), dK(t); dS(t) to shared memory; wait for both; dS(t + 1), no earlier: ptxas puts it into
// the registers that dK(t) reads (ptx/wgmma.cuh). Behind the last tile come slopes that nobody reads, of what is at
// hand: as rows and terms the tile of Q, as keys what is there.
template <class T, class L>
__device__ __forceinline__ void multiply_slopes(const Arguments& arguments, std::uint32_t base, const Unit* ring) {
  const int t = threadIdx.x % kGroupThreads, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0),
            key = warp * 16 + lane / 4;
  const std::uint32_t from = base + L::kP + t * 16;
  const int place = slopes_place(warp, lane);  // in a stage of dS
  float dk[L::kHeadDim / 2], dp[32];
  std::uint32_t p[16], ds[16];
  Position<L> at(arguments, base, ring);
  Stage<L::kDSStages> stored(1);
  const auto issue_slopes = [&](std::uint32_t rows, std::uint32_t terms) {
    ptx::fence_async_proxy();
    issue_transposed<T, L>(dp, at.v(), ptx::operand(rows), base + L::kWeights + L::kWeightBytes, terms);
  };
  // With dP^T of the tile in hand.
  const auto finish_slopes = [&] {
    ptx::named_barrier(kPFull, kPThreads);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::load_shared(from + j * kPStep, p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]);
    }
    ptx::named_barrier_arrive(kPEmpty, kPThreads);
    slopes<T>(ds, p, dp);
  };

  if (at.tiles == 0) return;
  ptx::named_barrier_arrive(kPEmpty, kPThreads);
  at.wait_q();
  at.wait_dout();
  issue_slopes(at.dout_tile(), at.terms());
  ptx::wgmma_wait<0>();
  ptx::pin(dp);
  ptx::barrier_arrive_if(lane == 0, base + L::kDOEmpty + at.dout.number * 8);
  at.dout.next();
  finish_slopes();
  bool goes_on;  // with the next tile
  do {
    const std::uint32_t q_tile = at.q_tile(), q_empty = base + L::kQEmpty + at.q.number * 8;
    const bool accumulate = at.tile > 0;
    at.q.next();
    at.next_tile();
    goes_on = at.tiles > 0;
    if (goes_on) {
      at.wait_q();  // the terms came with it
      at.wait_dout();
    }
    issue_slopes(goes_on ? at.dout_tile() : q_tile, goes_on ? at.terms() : q_tile);
    issue_sum<T>(dk, ds, ptx::operand(q_tile, L::kTileBand), accumulate);
    store_slopes<L>(base, place, stored, ds);
    ptx::wgmma_wait<1>();
    ptx::barrier_arrive_if(goes_on && lane == 0, base + L::kDOEmpty + at.dout.number * 8);
    at.dout.next();
    ptx::wgmma_wait<0>();
    ptx::pin(dp);
    ptx::barrier_arrive_if(lane == 0, q_empty);
    if (at.tile == 0) {
      ptx::pin(dk);
      store_sum<Sum::dk, T, L>(arguments, at.release_unit(), key, dk);
    }
    if (goes_on) finish_slopes();
  } while (goes_on);
}

}  // namespace moba::cuda::gradient
