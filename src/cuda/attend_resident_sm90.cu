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
// An H200, 64K tokens, 16 heads, B = 128, d = 128, 8 blocks a row: without the gather a prototype took 0.89 of its
// time, without the stores 0.79, without both 0.70; with fewer clocks a tile the clock rate falls too.
//
// Barriers, each a pair full/empty: K and V in two stages of one unit, Q in kQStages of one tile. Every consumer takes
// part in every unit: a unit counts at least as many tiles as there are consumers, the last may be empty.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstddef>
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
constexpr int kTilesAhead = 4;          // between the load of a row id and its use: less than its latency is seen
constexpr float kLargeScore = 0x1p20f;  // a maximum from here on is taken out before the factor
constexpr int kProducerBarrier = 1;
constexpr int kHalf = 64;  // keys; a tile that sees no more takes half the products

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

// A unit travels from the list to the ring in a register: word i of it in lane i of the producers' first warp, read
// while the unit before is gathered. Behind the last unit: one of 0 rows.
template <int kKeys>
__device__ __forceinline__ int unit_word(const Arguments& arguments, int ticket) {
  constexpr int kWords = sizeof(Unit) / 4, kRowsWord = offsetof(Unit, rows) / 4;
  const int lane = threadIdx.x % 32;
  ticket = __shfl_sync(kAllLanes, ticket, 0);
  if (ticket >= arguments.counters[1]) return lane == kRowsWord ? 0 : kKeys;
  return reinterpret_cast<const int*>(arguments.units + ticket)[min(lane, kWords - 1)];
}

// Puts unit n of this CTA, by the words of the first warp, into the ring when its stage is free, and asks for its keys.
// All producers.
template <int d, int kKeys>
__device__ __forceinline__ void take_unit(const CUtensorMap& k_map, const CUtensorMap& v_map,
                                          const Arguments& arguments, std::uint32_t base, Unit* ring, int n, int word) {
  using L = Layout<d, kKeys>;
  const int stage = n & 1, t = threadIdx.x % kProducers;
  const bool first_thread = t == 0;
  const std::uint32_t full = base + L::kKeyFull + stage * 8;
  if (t < 32) {
    ptx::barrier_wait(base + L::kKeyEmpty + stage * 8, ((n >> 1) & 1) ^ 1);
    if (t < static_cast<int>(sizeof(Unit) / 4)) reinterpret_cast<int*>(ring + stage)[t] = word;
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

  const auto load = [&](const Unit& unit, int row) {
    return __ldg(arguments.rows + unit.first + min(row + held, unit.rows - 1));
  };

  int ticket = 0, word = 0;  // of the unit behind the next; of the next
  if (t == 0) ticket = atomicAdd(arguments.counters, 1);
  if (warp == 0) word = unit_word<kKeys>(arguments, ticket);
  if (t == 0) ticket = atomicAdd(arguments.counters, 1);
  take_unit<d, kKeys>(k_map, v_map, arguments, base, ring, 0, word);
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
    if (warp == 0) word = unit_word<kKeys>(arguments, ticket);
    if (t == 0) ticket = atomicAdd(arguments.counters, 1);
    const char* from = arguments.q + unit.head * arguments.q_key_head_bytes + t % kLanes * 16;
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
                            from + static_cast<std::uint64_t>(units[p]) * arguments.q_unit);
          }
          ptx::copy_async_arrive(base + L::kQFull + stage * 8);
          if (++stage == L::kQStages) stage = 0, parity ^= 1;
        }
      }
      if (asks) {
        take_unit<d, kKeys>(k_map, v_map, arguments, base, ring, n + 1, word);
        if (last) load_later(next_unit, 0);
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
  if (masked) mask(scores, visible_keys(arguments, unit, row), visible_keys(arguments, unit, row + 8));
  float max0, max1;
  row_maxima(scores, max0, max1);
  const float top0 = max0 * arguments.factor, top1 = max1 * arguments.factor;
  float offset0 = top0, offset1 = top1;
  if (__any_sync(kAllLanes, fmaxf(fabsf(top0), fabsf(top1)) > kLargeScore)) {
    subtract(scores, max0, max1);
    offset0 = offset1 = 0;
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

  sum0 += __shfl_xor_sync(kAllLanes, sum0, 1), sum1 += __shfl_xor_sync(kAllLanes, sum1, 1);
  sum0 += __shfl_xor_sync(kAllLanes, sum0, 2), sum1 += __shfl_xor_sync(kAllLanes, sum1, 2);
  const int left = unit.rows - row;  // read here: in registers from the start they would make others spill
  const std::int64_t entry = unit.first + row;
  const float lse0 = top0 + ptx::log2_approx(sum0), lse1 = top1 + ptx::log2_approx(sum1);
  const bool any_empty = __any_sync(kAllLanes, sum0 == 0 || sum1 == 0);
  ptx::wgmma_wait<0>();
  ptx::pin(out);
  if (masked && any_not_finite(out)) {
    multiply_visible<T, d, 2 * n, kKeys>(out, weights, values, visible_keys(arguments, unit, row),
                                         visible_keys(arguments, unit, row + 8));
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
    ptx::barrier_arrive_if(lane == 0, base + L::kKeyEmpty + (n & 1) * 8);
    tile -= tiles, ++n;
    wait_unit();
  };
  // Whether the tile's last row, and so each, sees at most kHalf keys.
  const auto is_half = [&] {
    if (kHalf == kKeys || tile * kTileRows >= mask_rows) return false;
    const Unit& unit = ring[n & 1];
    return visible_keys(arguments, unit, min((tile + 1) * kTileRows, unit.rows) - 1) <= kHalf;
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
  // Rows are addressed in 32 bits of the greatest unit that divides their strides: 256 bytes for [Tq, Hq, 128], never
  // below 16. With one query head to a key head the distance between heads does not count.
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
