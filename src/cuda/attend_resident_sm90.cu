// attend where a unit's keys fit in shared memory (sm_90a; B <= 128, d 64 and 128): the rows of a list are gathered, 64
// to a tile, and meet the K and V of their block, which stay for the whole unit.
//
// A CTA per SM takes units by ticket. One warpgroup produces, the others consume, a tile each at a time:
//   S [64 rows, kKeys] = Q K^T       operands from shared memory; kKeys (64 or 128) >= the unit's keys
//   P = exp2(c S - max), in 16 bits  the block is one tile, so nothing is ever rescaled
//   O [64, d] = P V                  P from registers, V from shared memory; stored from registers in fragment order
// Order of a consumer: maxima of S(t); in pieces of 32 keys the exponentials, then the two steps of P V that they feed
// (at d = 128 and 128 keys 1686 clocks a tile, with P V in one piece 1851); S(t + 1) issued before O(t) is stored
// (1895; behind the stores 1963). No product is in flight at the loop's head: ptxas serialises all of them if a loop
// carries one over. (Clocks here and below: an H200, the prototype of this kernel, at different stages of it.)
//
// Barriers, each a pair full/empty: K and V in two stages of one unit, Q in kQStages of one tile. Every consumer takes
// part in every unit: a unit counts at least as many tiles as there are consumers, the last may be empty.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>

#include "cuda/attend_resident_tile.cuh"
#include "cuda/contract.h"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"

namespace moba::cuda {
namespace {

constexpr int kProducers = 128;  // threads
constexpr int kTileRows = 64;
constexpr int kTilesAhead = 4;          // between the load of a row id and its use; 1: 2244 clocks a tile, 4: 1895
constexpr float kLargeScore = 0x1p20f;  // a maximum from here on is taken out before the factor
constexpr int kProducerBarrier = 1;

// Shared memory in bytes, and who gets the registers: (consumers + 1) * 128 threads start with an equal share of 64K
// and trade. A fourth consumer leaves 112 to each, without spills only for d = 64 with 64 keys.
template <int d, int kKeys>
struct Layout {
  static constexpr int kConsumers = d == 64 && kKeys == 64 ? 4 : 3;  // warpgroups
  static constexpr bool kTight = d == 128 && kKeys == 128;           // S, O take 128 registers
  static constexpr int kConsumerRegisters = kTight ? 160 : kConsumers == 3 ? 152 : 104;
  static constexpr int kProducerRegisters = kTight ? 32 : kConsumers == 3 ? 56 : 64;
  static constexpr int kThreads = kConsumers * 128 + kProducers;
  static constexpr int kQStages = d == 64 ? 12 : kKeys == 64 ? 10 : 6;
  static constexpr int kQBytes = kTileRows * d * 2;
  static constexpr int kKeyBand = kKeys * kBandBytes;  // 64 columns of K or of V
  static constexpr int kKeyBytes = kKeys * d * 2;      // K or V
  static constexpr int kKeyStage = 2 * kKeyBytes;      // K, then V
  static constexpr int kQ = 2 * kKeyStage;
  static constexpr int kRing = kQ + kQStages * kQBytes;  // the unit of each stage
  static constexpr int kKeyFull = kRing + 2 * static_cast<int>(sizeof(Unit)), kKeyEmpty = kKeyFull + 2 * 8;
  static constexpr int kQFull = kKeyEmpty + 2 * 8, kQEmpty = kQFull + kQStages * 8;
  static constexpr int kBytes = kQEmpty + kQStages * 8;

  __device__ static int tiles(int rows) { return max((rows + kTileRows - 1) / kTileRows, kConsumers); }
};

// n / divisor for 0 <= n < 2^31.
struct Division {
  std::uint32_t magic;
  int shift;

  explicit Division(std::uint32_t divisor)
      : magic(static_cast<std::uint32_t>((std::uint64_t{1} << (31 + std::bit_width(divisor - 1))) / divisor + 1)),
        shift(std::bit_width(divisor - 1)) {}
  __device__ int operator()(int n) const {
    return static_cast<int>(__umulhi(2 * static_cast<std::uint32_t>(n), magic) >> shift);
  }
};

struct Arguments {
  const Unit* units;
  std::int32_t* counters;
  const std::int32_t* rows;
  const char* q;
  std::int64_t q_key_head_bytes;         // from the query heads of a key head to those of the next
  std::uint32_t q_unit;                  // bytes; row id i of a key head lies
  std::uint32_t row_units, token_units;  // row_units * i + token_units * token of them behind its first, mod 2^32
  const char *k, *v;                     // for units of fewer than kKeys keys
  std::int64_t k_token_bytes, k_head_bytes, v_token_bytes, v_head_bytes;
  char* out;
  float* lse;
  Division group;
  float factor;  // scale * log2 e, > 0
};

// ---- Producer ----

// The unit's keys from `from` on to shared memory at `to`, zeros behind them: the rows of memory there belong to other
// blocks or sequences, and a NaN of theirs would pass through the product with a weight of 0.
template <int d, int kKeys>
__device__ __forceinline__ void copy_short_keys(std::uint32_t to, const char* from, std::int64_t token_bytes,
                                                int keys) {
  constexpr int kChunks = d / 8;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll 2
  for (int row = threadIdx.x % kProducers / kChunks; row < kKeys; row += kProducers / kChunks) {
    ptx::copy_async(to + swizzled(row, chunk, kKeys), from + min(row, keys - 1) * token_bytes + chunk * 16,
                    row < keys ? 16 : 0);
  }
}

// Takes unit n of this CTA, by its ticket (of thread 0), when the stage is free, and asks for its keys. All producers.
template <int d, int kKeys>
__device__ __forceinline__ void take_unit(const CUtensorMap& k_map, const CUtensorMap& v_map,
                                          const Arguments& arguments, std::uint32_t base, Unit* ring, int n,
                                          int ticket) {
  using L = Layout<d, kKeys>;
  const int stage = n & 1;
  const bool first_thread = threadIdx.x % kProducers == 0;
  const std::uint32_t full = base + L::kKeyFull + stage * 8;
  if (first_thread) {
    ptx::barrier_wait(base + L::kKeyEmpty + stage * 8, ((n >> 1) & 1) ^ 1);
    if (ticket < arguments.counters[1]) {
      ring[stage] = arguments.units[ticket];
    } else {
      ring[stage].rows = 0;  // the end
      ring[stage].keys = kKeys;
    }
  }
  ptx::named_barrier(kProducerBarrier, kProducers);
  const Unit& unit = ring[stage];
  const std::uint32_t k = base + stage * L::kKeyStage, v = k + L::kKeyBytes;
  if (unit.keys < kKeys) {
    const std::int64_t token = unit.key_begin, head = unit.head;
    copy_short_keys<d, kKeys>(k, arguments.k + token * arguments.k_token_bytes + head * arguments.k_head_bytes,
                              arguments.k_token_bytes, unit.keys);
    copy_short_keys<d, kKeys>(v, arguments.v + token * arguments.v_token_bytes + head * arguments.v_head_bytes,
                              arguments.v_token_bytes, unit.keys);
    ptx::copy_async_arrive(full);
    if (first_thread) ptx::barrier_arrive(full);  // publishes the ring too, which arrival by cp.async need not do
    return;
  }
  ptx::barrier_arrive(full);
  if (!first_thread) return;
  ptx::barrier_arrive_expect(full, unit.rows > 0 ? L::kKeyStage : 0);
  if (unit.rows == 0) return;
#pragma unroll
  for (int band = 0; band < d / kBandColumns; ++band) {
    const int column = band * kBandColumns, offset = band * L::kKeyBand;
    ptx::copy_tensor_3d(k + offset, &k_map, full, column, unit.head, unit.key_begin);
    ptx::copy_tensor_3d(v + offset, &v_map, full, column, unit.head, unit.key_begin);
  }
}

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
  const std::uint32_t to = base + L::kQ + swizzled(t / kLanes, t % kLanes, kTileRows);
  const auto units_of = [&](int row) {
    return arguments.row_units * row + arguments.token_units * arguments.group(row);
  };

  take_unit<d, kKeys>(k_map, v_map, arguments, base, ring, 0, t == 0 ? atomicAdd(arguments.counters, 1) : 0);
  int stage = 0, parity = 1;
  for (int n = 0; ring[n & 1].rows > 0; ++n) {
    const int rows = ring[n & 1].rows, tiles = L::tiles(rows);
    // The next unit is asked for when its stage is, as a rule, free; never before the first tile of each consumer is
    // here, or it would wait for consumers that wait for their tile.
    const int ask = min(tiles, L::kQStages + 2);
    int ticket = 0;
    if (t == 0) ticket = atomicAdd(arguments.counters, 1);
    const std::int32_t* list = arguments.rows + ring[n & 1].first;
    const char* from = arguments.q + ring[n & 1].head * arguments.q_key_head_bytes + t % kLanes * 16;
    const auto load = [&](int row) { return __ldg(list + min(row + held, rows - 1)); };
    std::uint32_t now[2] = {units_of(load(0)), units_of(load(2 * kTileRows))};
    for (int tile = 0; tile < tiles; tile += kTilesAhead) {
      const int next = (tile + kTilesAhead) * kTileRows;
      const int later[2] = {load(next), load(next + 2 * kTileRows)};
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
                            from + static_cast<std::uint64_t>(units[p]) * arguments.q_unit);
          }
          ptx::copy_async_arrive(base + L::kQFull + stage * 8);
          if (++stage == L::kQStages) stage = 0, parity ^= 1;
        }
      }
      if (tile < ask && tile + kTilesAhead >= ask) {
        take_unit<d, kKeys>(k_map, v_map, arguments, base, ring, n + 1, ticket);
      }
      now[0] = units_of(later[0]), now[1] = units_of(later[1]);
    }
  }
  ptx::copy_async_wait_all();
}

// ---- Consumer ----

// Keys that row `i` of the unit sees.
__device__ __forceinline__ int visible_keys(const Arguments& arguments, const Unit& unit, int i) {
  if (i >= unit.masked) return unit.keys;
  const int row = unit.row0 >= 0 ? unit.row0 + i : arguments.rows[unit.first + i];
  return min(unit.keys, max(0, arguments.group(row) - unit.first_token + 1));
}

template <class T, int d, int kKeys>
__device__ __forceinline__ void consume(const Arguments& arguments, const char* shared, std::uint32_t base,
                                        const Unit* ring, int warpgroup) {
  using L = Layout<d, kKeys>;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32 % 4, 0);
  const int r = warp * 16 + lane / 4, c = lane % 4;  // rows r and r + 8 of a tile are this lane's
  float scores[kKeys / 2], out[d / 2];
  std::uint32_t weights[kKeys / 4];

  int n = 0, tile = warpgroup, stage = warpgroup, parity = 0;
  int rows, tiles, mask_rows;  // tiles 0: no more units. Tiles from row mask_rows on see all kKeys keys
  std::int64_t first;
  const auto wait_unit = [&] {
    ptx::barrier_wait(base + L::kKeyFull + (n & 1) * 8, (n >> 1) & 1);
    const Unit& unit = ring[n & 1];
    rows = unit.rows, first = unit.first;
    mask_rows = unit.keys < kKeys ? rows : unit.masked;
    tiles = rows > 0 ? L::tiles(rows) : 0;
  };
  const auto issue_scores = [&] {
    ptx::fence_async_proxy();  // Q, and short keys, came by cp.async
    ptx::wgmma_fence();
    const std::uint32_t a = ptx::operand(base + L::kQ) + stage * (L::kQBytes / 16);
    const std::uint32_t b = ptx::operand(base) + (n & 1) * (L::kKeyStage / 16);
#pragma unroll
    for (int k = 0; k < d / 16; ++k) {
      ptx::wgmma<T>(scores, a + k / 4 * (kTileRows * kBandBytes / 16) + k % 4 * 2,
                    b + k / 4 * (L::kKeyBand / 16) + k % 4 * 2, k > 0);
    }
    ptx::wgmma_commit();
  };

  // The next tile of this warpgroup, maybe of the next unit.
  const auto next_tile = [&] {
    tile += L::kConsumers, stage += L::kConsumers;
    if (stage >= L::kQStages) stage -= L::kQStages, parity ^= 1;
    if (tile < tiles) return;
    ptx::barrier_arrive_if(lane == 0, base + L::kKeyEmpty + (n & 1) * 8);
    tile -= tiles, ++n;
    wait_unit();
  };

  wait_unit();
  if (tiles == 0) return;
  ptx::barrier_wait(base + L::kQFull + stage * 8, parity);
  issue_scores();
  ptx::wgmma_wait<0>();
  ptx::pin(scores);
  do {
    ptx::barrier_arrive_if(lane == 0, base + L::kQEmpty + stage * 8);
    const int row = tile * kTileRows + r, left = rows - row;
    const std::int64_t entry = first + row;
    const bool masked = tile * kTileRows + warp * 16 < mask_rows;
    if (masked) {
      const Unit& unit = ring[n & 1];
      mask(scores, visible_keys(arguments, unit, row), visible_keys(arguments, unit, row + 8));
    }

    float max0, max1;
    row_maxima(scores, max0, max1);
    const float top0 = max0 * arguments.factor, top1 = max1 * arguments.factor;
    float offset0 = top0, offset1 = top1;
    if (__any_sync(kAllLanes, fmaxf(fabsf(top0), fabsf(top1)) > kLargeScore)) {
      subtract(scores, max0, max1);
      offset0 = offset1 = 0;
    }
    float sum0 = 0, sum1 = 0;
    const std::uint32_t v = ptx::operand(base + L::kKeyBytes, L::kKeyBand) + (n & 1) * (L::kKeyStage / 16);
#pragma unroll
    for (int piece = 0; piece < kKeys / 16; piece += kStepsInPiece) {
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

    sum0 += __shfl_xor_sync(kAllLanes, sum0, 1), sum1 += __shfl_xor_sync(kAllLanes, sum1, 1);
    sum0 += __shfl_xor_sync(kAllLanes, sum0, 2), sum1 += __shfl_xor_sync(kAllLanes, sum1, 2);
    if (c == 0 && left > 0) arguments.lse[entry] = top0 + ptx::log2_approx(sum0);
    if (c == 0 && left > 8) arguments.lse[entry + 8] = top1 + ptx::log2_approx(sum1);
    const bool any_empty = __any_sync(kAllLanes, sum0 == 0 || sum1 == 0);
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    if (masked && any_not_finite(out)) {
      const Unit& unit = ring[n & 1];
      multiply_visible<T, d, kKeys>(out, weights, shared + (n & 1) * L::kKeyStage + L::kKeyBytes,
                                    visible_keys(arguments, unit, row), visible_keys(arguments, unit, row + 8));
    }
    if (any_empty) clear_empty(out, sum0, sum1);

    next_tile();
    if (tiles > 0) ptx::barrier_wait(base + L::kQFull + stage * 8, parity);
    issue_scores();  // behind the last tile of all: a product that nobody reads, which keeps the control flow simple
    char* to = arguments.out + entry * (d * 2) + c * 16;
    if (left > 0) store_row<T, 0>(to, out, __fdividef(1, sum0));
    if (left > 8) store_row<T, 1>(to + 8 * d * 2, out, __fdividef(1, sum1));
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
  } while (tiles > 0);
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
      ptx::barrier_init(base + L::kKeyEmpty + i * 8, L::kConsumers * 4);
    }
    for (int i = 0; i < L::kQStages; ++i) {
      ptx::barrier_init(base + L::kQFull + i * 8, kProducers);
      ptx::barrier_init(base + L::kQEmpty + i * 8, 4);
    }
    ptx::fence_barrier_init();
  }
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

constexpr int kElementBytes = 2;

Arguments arguments_of(const Shape& shape, const AttendInput& input, const UnitList& list, const AttendOutput& output) {
  // Rows are addressed in 32 bits of the greatest unit that divides their strides: 256 bytes for [Tq, Hq, 128], at
  // least
  // 16. With one query head to a key head the distance between heads does not count.
  const std::int64_t token_bytes = input.q.token_stride * kElementBytes;
  const std::int64_t head_bytes = shape.group == 1 ? 0 : input.q.head_stride * kElementBytes;
  constexpr std::int64_t kLargestUnit = 1 << 16;
  const std::int64_t unit = std::gcd(std::gcd(token_bytes, head_bytes), kLargestUnit);
  const std::int64_t reach = (shape.total_q - 1) * (token_bytes / unit) + (shape.group - 1) * (head_bytes / unit);
  if (reach > std::numeric_limits<std::uint32_t>::max()) {
    throw Error("q: strides of " + std::to_string(input.q.token_stride) + " (tokens) and " +
                std::to_string(input.q.head_stride) + " (heads) elements reach too far; allowed are " +
                std::to_string(unit << 32) + " bytes for the heads of a key head");
  }
  return {.units = list.units,
          .counters = list.counters,
          .rows = input.rows,
          .q = static_cast<const char*>(input.q.data),
          .q_key_head_bytes = shape.group * input.q.head_stride * kElementBytes,
          .q_unit = static_cast<std::uint32_t>(unit),
          .row_units = static_cast<std::uint32_t>(head_bytes / unit),
          .token_units = static_cast<std::uint32_t>((token_bytes - shape.group * head_bytes) / unit),
          .k = static_cast<const char*>(input.k.data),
          .v = static_cast<const char*>(input.v.data),
          .k_token_bytes = input.k.token_stride * kElementBytes,
          .k_head_bytes = input.k.head_stride * kElementBytes,
          .v_token_bytes = input.v.token_stride * kElementBytes,
          .v_head_bytes = input.v.head_stride * kElementBytes,
          .out = static_cast<char*>(output.partials.out),
          .lse = output.partials.lse,
          .group = Division(static_cast<std::uint32_t>(shape.group)),
          // Not 0, which would make a masked score NaN; scores are as good as 0 all the same.
          .factor = std::max(static_cast<float>(shape.scale * std::numbers::log2e), FLT_MIN)};
}

template <class T, int d, int kKeys>
void launch_attend(const Shape& shape, const AttendInput& input, const Arguments& arguments, cudaStream_t stream) {
  using L = Layout<d, kKeys>;
  const auto map = [&](const View<const void>& view) {
    return tensor_map_3d(shape.dtype, view, d, shape.kv_heads, shape.total_k, kKeys);
  };
  launch(attend_resident<T, d, kKeys>, dim3(static_cast<unsigned>(shape.sm_count)), L::kThreads, L::kBytes, stream,
         map(input.k), map(input.v), arguments);
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

void attend_resident_sm90(const Shape& shape, const AttendInput& input, const UnitList& list,
                          const AttendOutput& output, cudaStream_t stream) {
  if (shape.total_q == 0 || shape.total_k == 0 || shape.max_blocks == 0) return;
  const Arguments arguments = arguments_of(shape, input, list, output);
  (shape.dtype == DType::bf16 ? launch_attend<__nv_bfloat16> : launch_attend<__half>)(shape, input, arguments, stream);
}

}  // namespace moba::cuda
