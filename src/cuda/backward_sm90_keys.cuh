// A key warpgroup of backward_sm90.cu: S^T, dP^T, dV and dK of 64 keys. Of a tile's transposed matrices
// [64 keys, 64 rows], and of dK and dV [64 keys, d], warp w has the keys 16w to 16w + 15. Its lane 4r + c has the
// columns 8j + 2c, 8j + 2c + 1 of two keys: of key r in x[4j], x[4j + 1], of key r + 8 in x[4j + 2], x[4j + 3].
#pragma once

#include <cstdint>

#include "cuda/backward_sm90_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace moba::cuda::gradient {

inline constexpr int kGroupKeys = 64;

// A sum [64 keys, d] times `factor`, as rows of 16-bit elements or of floats; `to` is that of key r, `pitch` elements
// from a key to the next. Keys from `keys` on, counted from key r, are not written.
template <class T, int n>
__device__ __forceinline__ void store_final(const float (&sum)[n], float factor, std::uint16_t* to, std::int64_t pitch,
                                            int keys) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < n / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t words[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int i = 16 * m + 4 * x + 2 * half;
        words[x] = ptx::pack<T>(sum[i] * factor, sum[i + 1] * factor);
      }
      quad_transpose(words, c);
      if (8 * half >= keys) continue;
      *reinterpret_cast<uint4*>(to + 8 * half * pitch + 32 * m + 8 * c) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// `adds`: to what is there.
template <int n>
__device__ __forceinline__ void store_floats(const float (&sum)[n], float factor, float* to, int keys, bool adds) {
  constexpr int d = 2 * n;
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < n / 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= keys) continue;
      float2* place = reinterpret_cast<float2*>(to + 8 * half * d + 8 * j + 2 * c);
      const float2 before = adds ? *place : make_float2(0, 0);
      const int i = 4 * j + 2 * half;
      *place = make_float2(before.x + sum[i] * factor, before.y + sum[i + 1] * factor);
    }
  }
}

enum class Sum { dk, dv };

// One of the two sums of a unit, of which this lane's first key is key `key`.
template <Sum which, class T, int d>
__device__ __forceinline__ void store_sum(const Arguments& arguments, const Unit& unit, int key,
                                          const float (&sum)[d / 2]) {
  constexpr bool is_dk = which == Sum::dk;
  const float factor = is_dk ? arguments.scale : 1;
  const int keys = unit.keys - key;
  if (unit.share >= 0) {
    constexpr std::int64_t kFloats = std::int64_t{kSm90PartKeys} * d;
    float* to = arguments.shares + (2 * static_cast<std::int64_t>(unit.share) + (is_dk ? 0 : 1)) * kFloats;
    return store_floats(sum, factor, to + key * d, keys, false);
  }
  const std::int64_t token = unit.key_begin + key;
  float* totals = is_dk ? arguments.totals.dk : arguments.totals.dv;
  if (totals != nullptr) return store_floats(sum, factor, totals + token * d, keys, true);
  const View<void>& view = is_dk ? arguments.dk : arguments.dv;
  store_final<T>(sum, factor,
                 static_cast<std::uint16_t*>(view.data) + token * view.token_stride + unit.head * view.head_stride,
                 view.token_stride, keys);
}

// S^T -> P^T.
__device__ __forceinline__ void weigh(float (&s)[32], float factor) {
#pragma unroll
  for (float& x : s) x = ptx::exp2_approx(x * factor);
}

// The first rows of the unit that do not see its key `key`: rows ascend, and so does what they see. Mostly they are
// consecutive.
__device__ __forceinline__ int blind_rows(const Arguments& arguments, const Unit& unit, int key) {
  if (key >= unit.keys) return unit.rows;
  const std::int64_t first = (static_cast<std::int64_t>(unit.first_token) + key) * arguments.group;
  if (unit.row0 >= 0) return static_cast<int>(min(max(first - unit.row0, std::int64_t{0}), std::int64_t{unit.masked}));
  int low = 0, high = unit.masked;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (arguments.rows[unit.first + middle] < first) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// P^T is 0 where a row does not see this lane's keys, `key` and `key` + 8; `row` is row 2c of the tile.
__device__ __forceinline__ void mask_weights(float (&p)[32], const Arguments& arguments, const Unit& unit, int key,
                                             int row) {
  const int blind0 = blind_rows(arguments, unit, key) - row, blind1 = blind_rows(arguments, unit, key + 8) - row;
  if (!__any_sync(kAllLanes, blind1 > 0)) return;  // the later key is seen by no more rows than the earlier
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i < blind0) p[4 * j + i] = 0;
      if (8 * j + i < blind1) p[4 * j + 2 + i] = 0;
    }
  }
}

// P^T, as packed for dV, and dP^T -> dS^T, packed.
template <class T>
__device__ __forceinline__ void slopes(std::uint32_t (&ds)[16], const std::uint32_t (&p)[16], const float (&dp)[32]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 weights = ptx::unpack<T>(p[j]);
    ds[j] = ptx::pack<T>(weights.x * dp[2 * j], weights.y * dp[2 * j + 1]);
  }
}

// [64 keys, 64 rows] = A [64 keys, d] B^T, both K-major, plus the terms of each row that the weights pick: K Q^T - lse
// or V dO^T - delta.
template <class T, int d>
__device__ __forceinline__ void issue_transposed(float (&product)[32], std::uint32_t keys, std::uint32_t rows,
                                                 std::uint32_t weights, std::uint32_t terms) {
  using L = Layout<d>;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < d / 16; ++k) {
    ptx::wgmma<T>(product, keys + k / 4 * (L::kKeyBand / 16) + k % 4 * 2,
                  rows + k / 4 * (L::kTileBand / 16) + k % 4 * 2, k > 0);
  }
  ptx::wgmma_add_terms(product, weights, terms);
  ptx::wgmma_commit();
}

// sum [64 keys, d] (+)= weights [64 keys, 64 rows] rows [64 rows, d]: P^T dO or dS^T Q.
template <class T, int n>
__device__ __forceinline__ void issue_sum(float (&sum)[n], const std::uint32_t (&weights)[16], std::uint32_t rows,
                                          bool accumulate) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileRows / 16; ++k) {
    ptx::wgmma_registers<T>(sum, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3],
                            rows + k * kBandBytes, accumulate || k > 0);
  }
  ptx::wgmma_commit();
}

// Order of a tile t: dV(t), dP(t); wait; dS(t); S(t + 1), dK(t); dS(t) to shared memory; wait for S(t + 1); P(t + 1)
// under dK(t). The next tile may be of the next unit, whose keys are in the other stage already. No product is in
// flight at a loop's head: ptxas serialises all of them if a loop carries one over. The first tiles of a unit whose
// rows see none of the group's keys take no part: dS is 0.
template <class T, int d>
__device__ __forceinline__ void multiply_keys(const Arguments& arguments, std::uint32_t base, const Unit* ring,
                                              int group) {
  using L = Layout<d>;
  const int t = threadIdx.x % 128, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0), c = lane % 4;
  const int key = group * kGroupKeys + warp * 16 + lane / 4;
  const std::uint32_t group_keys = ptx::operand(base + group * kGroupKeys * kBandBytes);
  const std::uint32_t q_rows = ptx::operand(base + L::kQ), q_columns = ptx::operand(base + L::kQ, L::kTileBand);
  const std::uint32_t dout_rows = ptx::operand(base + L::kDO), dout_columns = ptx::operand(base + L::kDO, L::kTileBand);
  // Lane l stores row l % 8 of 8x8 tile l / 8: keys 8 (l / 8 % 2) on, rows 8 (l / 16) on.
  const int stored_row = lane % 8 + lane / 16 * 8;
  const std::uint32_t ds_to =
      base + L::kDS + group * L::kTileBand + swizzled(kBandBytes, stored_row, 2 * warp + lane / 8 % 2);
  float dk[d / 2], dv[d / 2], s[32];  // s: S^T, P^T, then dP^T
  std::uint32_t p[16], ds[16];

  // tiles 0: no more units. Tiles before blind_tiles see nothing, those from row mask_rows on all keys.
  int n = 0, tile = 0, tiles, blind_tiles, mask_rows;
  const auto wait_unit = [&] {
    ptx::barrier_wait(base + L::kKeyFull + (n & 1) * 8, (n >> 1) & 1);
    const Unit& unit = ring[n & 1];
    tiles = (unit.rows + kTileRows - 1) / kTileRows;
    mask_rows = unit.keys < L::kKeys ? unit.rows : unit.masked;
    blind_tiles = 0;
    if (mask_rows == 0) return;
    const int blind = blind_rows(arguments, unit, group * kGroupKeys);
    blind_tiles = blind == unit.rows ? tiles : blind / kTileRows;
  };
  Stage<L::kQStages> q(0);
  Stage<L::kDOStages> dout(0);
  int ds_parity = 1;
  const auto terms = [&](int dout_stage) { return base + L::kTerms + dout_stage * L::kTermBytes; };
  const auto issue_scores = [&](int q_stage, std::uint32_t q_terms) {
    issue_transposed<T, d>(s, group_keys + (n & 1) * (L::kKeyStage / 16), q_rows + q_stage * (L::kTileBytes / 16),
                           base + L::kWeights, q_terms);
  };
  const auto issue_slopes = [&](int dout_stage) {
    issue_transposed<T, d>(s, group_keys + (n & 1) * (L::kKeyStage / 16) + L::kKeyBytes / 16,
                           dout_rows + dout_stage * (L::kTileBytes / 16), base + L::kWeights + L::kWeightBytes,
                           terms(dout_stage));
  };
  const auto finish_weights = [&] {
    weigh(s, arguments.factor);
    if (tile * kTileRows < mask_rows) mask_weights(s, arguments, ring[n & 1], key, tile * kTileRows + 2 * c);
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int j = 0; j < 16; ++j) p[j] = ptx::pack<T>(s[2 * j], s[2 * j + 1]);
  };
  const auto store_slopes = [&] {
    ptx::barrier_wait(base + L::kDSEmpty, ds_parity);
    ds_parity ^= 1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::store_matrix_x4_transposed(ds_to + j * 16 * kBandBytes, ds[4 * j], ds[4 * j + 1], ds[4 * j + 2],
                                      ds[4 * j + 3]);
    }
    ptx::fence_async_proxy();
    __syncwarp();
    ptx::barrier_arrive_if(lane == 0, base + L::kDSFull);
  };
  // Unit n - 1 has ended. Every lane arrives, for every lane has read the unit.
  const auto finish_unit = [&] {
    const Unit unit = ring[(n - 1) & 1];
    ptx::barrier_arrive(base + L::kKeyEmpty + ((n - 1) & 1) * 8);
    ptx::pin(dk);
    ptx::pin(dv);
    store_sum<Sum::dk, T, d>(arguments, unit, key, dk);
    store_sum<Sum::dv, T, d>(arguments, unit, key, dv);
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
    store_slopes();
  };

  // Works from tile `tile` of unit n to the end of the unit, and on through units that begin with tiles to work on.
  const auto work = [&] {
    ptx::barrier_wait(base + L::kQFull + q.number * 8, q.parity);
    ptx::fence_async_proxy();
    issue_scores(q.number, terms(dout.number));
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    finish_weights();
    pack_weights();
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
      store_slopes();
      ptx::wgmma_wait<1>();
      ptx::pin(s);
      finish_weights();
      ptx::wgmma_wait<0>();
      pack_weights();  // into the registers that dV read
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
