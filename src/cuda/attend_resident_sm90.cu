// attend where a unit's keys fit in shared memory (sm_90a; B <= 128, d 64 and 128): the rows of a list are gathered, 64
// to a tile, and meet the K and V of their block, which stay for the whole unit.
//
// A CTA per SM takes units by ticket. One warpgroup produces, the others consume, a tile each at a time:
//   S [64 rows, kKeys] = Q K^T       operands from shared memory; kKeys (64 or 128) >= the unit's keys
//   P = exp2(c S - max), in 16 bits  the block is one tile, so nothing is ever rescaled
//   O [64, d] = P V                  P from registers, V from shared memory; stored from registers in fragment order
// Order of a consumer: maxima of S(t); in pieces of 32 keys the exponentials, then the two steps of P V that they feed;
// S(t + 1) issued before O(t) is stored. No product is in flight at the loop's head or at an exit: ptxas serialises all
// of them if a loop carries one over. Tiles of the diagonal that see 64 keys at most take half the products, by a way
// of their own, one after the other.
//
// Shared memory and the barriers, pairs full/empty, are described in attend_resident_shared.cuh: K and V in two stages
// of one unit, Q in kQStages of one tile.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <numbers>

#include "cuda/attend_resident_producers.cuh"
#include "cuda/attend_resident_shared.cuh"
#include "cuda/attend_resident_tile.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/visible_keys.cuh"

namespace moba::cuda {
namespace resident {
namespace {

constexpr int kHalf = 64;               // keys; a tile that sees no more takes half the products
constexpr float kLargeScore = 0x1p20f;  // a row's maximum from here on is taken out before the factor

// What a lane has to store of a tile besides the outputs of its two rows, the first of them at `entry`.
struct Results {
  int left;  // rows of the unit from the first on
  std::int64_t entry;
  float lse0, lse1;
  float sum0, sum1;  // that the outputs are still to be divided by; 1 for a row that sees nothing
};

// S = Q K^T for the first 2 n keys, from Q's and K's operands.
template <class T, int d, int kKeys, int n>
__device__ __forceinline__ void issue_scores(float (&scores)[n], std::uint32_t a, std::uint32_t b) {
  using L = Layout<d, kKeys>;
  ptx::fence_async_proxy();  // Q, and short keys, came by cp.async
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < d / 16; ++k) {
    ptx::wgmma<T>(scores, a + k / 4 * (kTileRows * kBandBytes / 16) + k % 4 * 2,
                  b + k / 4 * (L::kKeyBand / 16) + k % 4 * 2, k > 0);
  }
  ptx::wgmma_commit();
}

// From the scores of a tile to its outputs and the rest. `n` as in issue_scores; `row` is this lane's first, `masked`
// says that rows of the warp see fewer than all 2 n keys; `v` is V's operand, `values` V itself.
template <class T, int d, int kKeys, int n>
__device__ __forceinline__ Results finish_tile(const Arguments& arguments, const Unit& unit, int row, bool masked,
                                               float (&scores)[n], float (&out)[d / 2], std::uint32_t v,
                                               const char* values) {
  std::uint32_t weights[n / 2];
  const auto visible = [&](int i) { return visible_keys(unit, i, arguments.rows, arguments.by_group); };
  if (masked) mask(scores, visible(row), visible(row + 8));
  float max0, max1;
  row_maxima(scores, max0, max1);
  const float top0 = max0 * arguments.factor, top1 = max1 * arguments.factor;
  float offset0 = top0, offset1 = top1;
  // Like the votes below this one only spares work: what becomes of a row depends on nothing but the row. A row that
  // sees no key may count as large: its scores stay -inf, where -inf less an overflowed top would be NaN.
  if (__any_sync(kAllLanes, fmaxf(fabsf(top0), fabsf(top1)) > kLargeScore)) {
    const bool large0 = fabsf(top0) > kLargeScore, large1 = fabsf(top1) > kLargeScore;
    subtract(scores, large0 ? max0 : 0, large1 ? max1 : 0);
    offset0 = large0 ? 0 : top0, offset1 = large1 ? 0 : top1;
  }
  float sum0 = 0, sum1 = 0;
#pragma unroll
  for (int piece = 0; piece < n / 8; piece += kStepsInPiece) {
    exponentials<T>(scores, weights, 8 * piece, arguments.factor, offset0, offset1, sum0, sum1);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepsInPiece; ++i) {
      const int k = piece + i;
      ptx::wgmma_registers<T>(out, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3],
                              v + k * kBandBytes, k > 0);
    }
    ptx::wgmma_commit();
  }

  sum0 = quad_sum(sum0), sum1 = quad_sum(sum1);
  const int left = unit.rows - row;  // read here: in registers from the start they would make others spill
  const std::int64_t entry = unit.first + row;
  const float lse0 = top0 + ptx::log2_approx(sum0), lse1 = top1 + ptx::log2_approx(sum1);
  const bool any_empty = __any_sync(kAllLanes, sum0 == 0 || sum1 == 0);
  ptx::wgmma_wait<0>();
  ptx::pin(out);
  if (masked) {
    bool redo0, redo1;
    find_not_finite(out, redo0, redo1);
    if (__any_sync(kAllLanes, redo0 || redo1)) {
      // Not a row that sees all of the unit: it has nothing but its own to show.
      const int visible0 = visible(row), visible1 = visible(row + 8);
      redo0 = redo0 && visible0 < unit.keys, redo1 = redo1 && visible1 < unit.keys;
      multiply_visible<T, d, 2 * n, kKeys>(out, weights, values, redo0 ? visible0 : 0, redo1 ? visible1 : 0);
    }
  }
  if (any_empty) clear_empty(out, sum0, sum1);
  return {left, entry, lse0, lse1, sum0, sum1};
}

template <class T, int d, int kKeys>
__device__ __forceinline__ void consume(const Arguments& arguments, const char* shared, std::uint32_t base,
                                        const Unit* ring, int warpgroup) {
  using L = Layout<d, kKeys>;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32 % 4, 0);
  float out[d / 2];

  int n = 0, tile = warpgroup, stage = warpgroup, parity = 0;
  int tiles, mask_rows;  // tiles 0: no more units. Tiles from row mask_rows on see all kKeys keys
  const auto wait_unit = [&] {
    ptx::barrier_wait(base + L::kKeyFull + (n & 1) * 8, (n >> 1) & 1);
    const Unit& unit = ring[n & 1];
    mask_rows = unit.keys < kKeys ? unit.rows : unit.masked;
    tiles = unit.rows > 0 ? L::tiles(unit.rows) : 0;
  };
  // The next tile of this warpgroup, maybe of the next unit.
  const auto next_tile = [&] {
    tile += L::kConsumers, stage += L::kConsumers;
    if (stage >= L::kQStages) stage -= L::kQStages, parity ^= 1;
    if (tile < tiles) return;
    ptx::barrier_arrive(base + L::kKeyEmpty + (n & 1) * 8);  // every lane, for every lane has read the unit
    tile -= tiles, ++n;
    wait_unit();
  };
  // Whether the tile's last row, and so each, sees at most kHalf keys.
  const auto is_half = [&] {
    if (kHalf == kKeys || tile * kTileRows >= mask_rows) return false;
    const Unit& unit = ring[n & 1];
    const int last = min((tile + 1) * kTileRows, unit.rows) - 1;
    return visible_keys(unit, last, arguments.rows, arguments.by_group) <= kHalf;
  };
  const auto wait_queries = [&] { ptx::barrier_wait(base + L::kQFull + stage * 8, parity); };
  const auto issue = [&](auto& scores) {
    issue_scores<T, d, kKeys>(scores, ptx::operand(base + L::kQ) + stage * (L::kQBytes / 16),
                              ptx::operand(base) + (n & 1) * (L::kKeyStage / 16));
  };
  const auto finish = [&](auto& scores) {
    ptx::barrier_arrive_if(lane == 0, base + L::kQEmpty + stage * 8);
    const int warp_row = tile * kTileRows + warp * 16, key_stage = (n & 1) * L::kKeyStage;
    return finish_tile<T, d, kKeys>(arguments, ring[n & 1], warp_row + lane / 4, warp_row < mask_rows, scores, out,
                                    ptx::operand(base + L::kKeyBytes, L::kKeyBand) + key_stage / 16,
                                    shared + key_stage + L::kKeyBytes);
  };
  const auto store = [&](const Results& results) {
    float* lse = arguments.lse + results.entry;
    char* to = arguments.out + results.entry * (d * 2) + lane % 4 * 16;
    if (results.left > 0) {
      if (lane % 4 == 0) lse[0] = results.lse0;
      store_row<T, 0>(to, out, __fdividef(1, results.sum0));
    }
    if (results.left > 8) {
      if (lane % 4 == 0) lse[8] = results.lse1;
      store_row<T, 1>(to + 8 * d * 2, out, __fdividef(1, results.sum1));
    }
  };

  wait_unit();
  while (tiles > 0) {
    if (is_half()) {
      float scores[kHalf / 2];
      wait_queries();
      issue(scores);
      ptx::wgmma_wait<0>();
      ptx::pin(scores);
      store(finish(scores));
      next_tile();
      continue;
    }
    float scores[kKeys / 2];
    wait_queries();
    issue(scores);
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    while (true) {
      const Results results = finish(scores);
      next_tile();
      if (tiles == 0 || is_half()) {
        store(results);
        break;
      }
      wait_queries();
      issue(scores);  // its fence waits for stores too, so that none comes shortly before
      store(results);
      ptx::wgmma_wait<0>();
      ptx::pin(scores);
    }
  }
}

template <class T, int d, int kKeys>
__global__ void __launch_bounds__(Layout<d, kKeys>::kThreads, 1)
    attend_resident(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ Arguments arguments) {
  using L = Layout<d, kKeys>;
  extern __shared__ __align__(1024) char shared[];
  const std::uint32_t base = ptx::shared_address(shared);
  Unit* ring = reinterpret_cast<Unit*>(shared + L::kRing);
  // By a shuffle, so that the compiler knows it to be the same in the whole warp.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(base + L::kKeyFull + i * 8, kProducers + 1);
      ptx::barrier_init(base + L::kKeyEmpty + i * 8, L::kConsumers * 128);
    }
    for (int i = 0; i < L::kQStages; ++i) {
      ptx::barrier_init(base + L::kQFull + i * 8, kProducers);
      ptx::barrier_init(base + L::kQEmpty + i * 8, 4);
    }
    ptx::fence_barrier_init();
  }
  ptx::start_behind_previous();
  __syncthreads();
  if (warpgroup == L::kConsumers) {
    ptx::lower_registers<L::kProducerRegisters>();
    produce<d, kKeys>(k_map, v_map, arguments, base, ring);
  } else {
    ptx::raise_registers<L::kConsumerRegisters>();
    consume<T, d, kKeys>(arguments, shared, base, ring, warpgroup);
  }
}

// ---- Host ----

Arguments arguments_of(const Shape& shape, const AttendInput& input, const UnitList& list, const AttendOutput& output) {
  return {.keys = key_source(list, input.k, input.v),
          .rows = input.rows,
          .q = RowAddresses(input.q, shape.group),
          .out = static_cast<char*>(output.partials.out),
          .lse = output.partials.lse,
          .by_group = Divide(shape.group),
          // Not 0, which would make a masked score NaN; scores are as good as 0 all the same.
          .factor = std::max(static_cast<float>(shape.scale * std::numbers::log2e), FLT_MIN)};
}

template <class T, int d, int kKeys>
void launch_attend(const Shape& shape, const AttendInput& input, const Arguments& arguments, cudaStream_t stream) {
  using L = Layout<d, kKeys>;
  const auto map = [&](const View<const void>& view) {
    return tensor_map_3d(shape.dtype, view, d, shape.kv_heads, shape.total_k, kKeys);
  };
  launch(Start::early, attend_resident<T, d, kKeys>, dim3(static_cast<unsigned>(shape.sm_count)), L::kThreads,
         L::kBytes, stream, map(input.k), map(input.v), arguments);
}

template <class T>
void launch_attend(const Shape& shape, const AttendInput& input, const Arguments& arguments, cudaStream_t stream) {
  const bool narrow = shape.block_size <= 64;
  if (shape.head_dim == 128) {
    (narrow ? launch_attend<T, 128, 64> : launch_attend<T, 128, 128>)(shape, input, arguments, stream);
  } else {
    (narrow ? launch_attend<T, 64, 64> : launch_attend<T, 64, 128>)(shape, input, arguments, stream);
  }
}

}  // namespace
}  // namespace resident

void attend_resident_sm90(const Shape& shape, const AttendInput& input, const UnitList& list,
                          const AttendOutput& output, cudaStream_t stream) {
  if (shape.total_q == 0 || shape.total_k == 0 || shape.max_blocks == 0) return;
  const resident::Arguments arguments = resident::arguments_of(shape, input, list, output);
  (shape.dtype == DType::bf16 ? resident::launch_attend<__nv_bfloat16>
                              : resident::launch_attend<__half>)(shape, input, arguments, stream);
}

}  // namespace moba::cuda
