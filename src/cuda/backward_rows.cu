// What backward does by rows: row_values() before the products over blocks, sum_queries() behind them.
#include <cmath>
#include <limits>
#include <numbers>

#include "cuda/batch.cuh"
#include "cuda/chunk.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // partial rows in flight a lane

// Lanes of a row, a chunk of 16 bytes each; for head dims between some have none.
int lanes_of(int head_dim) { return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32; }

template <int kGroup>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

struct Heads {
  int q_head_begin, q_heads;  // of the slab
  int token_begin, tokens;
  int group, head_dim;
};

// kGroup lanes a row, rows in the order of memory: the heads of a token side by side.
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    value_rows(Heads slab, View<const void> out, View<const void> dout, View<const void> lse, RowValues values) {
  // 32 bits: a tensor spans up to 64 GiB, and a row of it 64 bytes or more.
  const int i = static_cast<int>(blockIdx.x * (kThreads / kGroup) + threadIdx.x / kGroup);
  const int rows = slab.tokens * slab.q_heads;
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const std::int64_t token = i / slab.q_heads;
  const int head = i - static_cast<int>(token) * slab.q_heads, key_head = head / slab.group;
  const bool is_row = i < rows, has_chunk = is_row && lane * 8 < slab.head_dim;
  const auto chunk = [&](const View<const void>& view) {
    if (!has_chunk) return splat(0);
    return __ldcs(reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(view.data) +
                                                 (slab.token_begin + token) * view.token_stride +
                                                 (slab.q_head_begin + head) * view.head_stride) +
                  lane);
  };
  const uint4 a = chunk(out), b = chunk(dout);
  const std::uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 u = ptx::unpack<T>(x[j]), v = ptx::unpack<T>(y[j]);
    sum += u.x * v.x + u.y * v.y;
  }
  sum = group_sum<kGroup>(sum);
  if (lane != 0 || i > rows) return;
  if (i == rows) {
    values.lse[rows] = INFINITY;
    values.delta[rows] = 0;
    return;
  }
  const std::int64_t to = (key_head * static_cast<std::int64_t>(slab.tokens) + token) * slab.group + head % slab.group;
  const float value = static_cast<const float*>(
      lse.data)[(slab.q_head_begin + head) * lse.head_stride + (slab.token_begin + token) * lse.token_stride];
  const bool empty = value == -INFINITY;  // gives nothing, whatever its dout is
  values.lse[to] = empty ? INFINITY : value * std::numbers::log2e_v<float>;
  values.delta[to] = empty ? 0 : sum;
}

struct Sizes {
  int head_begin, token_begin, rows;  // rows of a key head of the slab
  int group, slots, head_dim, max_blocks, batch;
  int block_size;  // of dense: more than any sequence has keys
  bool causal, dense;
};

// How many partials of the pass an id of a row has: the parts of the block that the row sees.
__device__ __forceinline__ int parts_seen(const Sizes& sizes, const Pass& pass, const DeviceSequence& s, int token,
                                          int id) {
  const std::int64_t start = static_cast<std::int64_t>(id) * sizes.block_size;
  const int end = sizes.causal ? min(s.k_len, s.k_len - s.q_len + token - s.q_begin + 1) : s.k_len;
  const int keys = static_cast<int>(min(max(end - start, std::int64_t{0}), std::int64_t{sizes.block_size}));
  return min(pass.parts, max(0, (keys + pass.part_keys - 1) / pass.part_keys - pass.part_begin));
}

// kGroup lanes a row, d / 8 of them with a chunk of 16 bytes; grid: (rows, heads of the slab). kParts: blocks may have
// several parts; else each has one, and all are of this pass.
template <class T, int kGroup, bool kParts>
__global__ void __launch_bounds__(kThreads, 4)
    sum_rows(Sizes sizes, Pass pass, Batch batch, QuerySums sums, View<void> dq) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int row = static_cast<int>(blockIdx.x) * (kThreads / kGroup) + static_cast<int>(threadIdx.x) / kGroup;
  const int head = static_cast<int>(blockIdx.y), token_in_slab = row / sizes.group;
  const bool is_row = row < sizes.rows, has_chunk = is_row && lane * 8 < sizes.head_dim;
  const std::int64_t head_row = static_cast<std::int64_t>(head) * sizes.rows + (is_row ? row : 0);
  const int token = sizes.token_begin + (is_row ? token_in_slab : 0);
  const std::int32_t *positions = nullptr, *ids = nullptr;
  std::int64_t head_entry = head_row;
  bool invalid = false;
  if (!sizes.dense) {
    positions = sums.index.positions + head_row * sizes.slots;
    head_entry = sums.index.offsets[static_cast<std::int64_t>(head) * sizes.max_blocks];
    invalid = __ldg(positions) == kInvalidRow;
    ids = sums.ids.data + head * sums.ids.head_stride + (token - sizes.token_begin) * sums.ids.token_stride +
          (is_row ? row - token_in_slab * sizes.group : 0) * sums.ids.group_stride;
  }
  DeviceSequence sequence{};
  if constexpr (kParts) {
    const int number = find_sequence(batch, sizes.batch, token);
    invalid = invalid || number < 0;
    if (number >= 0) sequence = batch.sequences[number];
  }
  // Entry of partial i of the row, counted part after part and slot after slot in each; -1 for none.
  const auto entry_of = [&](int i) -> std::int64_t {
    const int part = kParts ? i / sizes.slots : 0, slot = i - part * sizes.slots;
    if (!is_row || invalid || part >= (kParts ? pass.parts : 1)) return -1;
    const int position = sizes.dense ? 0 : __ldg(positions + slot);
    if (position < 0) return -1;
    if (kParts && part >= parts_seen(sizes, pass, sequence, token, sizes.dense ? 0 : __ldg(ids + slot))) return -1;
    return position + part * sums.part_stride;
  };
  const uint4* partials =
      static_cast<const uint4*>(sums.partials) + head_entry * (sizes.head_dim / 8) + (has_chunk ? lane : 0);
  float sum[8] = {};
  const int count = sizes.slots * (kParts ? pass.parts : 1);
  for (int first = 0; first < count; first += kLoads) {
    const int mine = first + lane % kLoads;
    const std::int64_t entry = mine < count ? entry_of(mine) : -1;
    uint4 chunk[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t at = __shfl_sync(kAllLanes, entry, i, kGroup);
      chunk[i] = at >= 0 && has_chunk ? __ldcs(partials + at * (sizes.head_dim / 8)) : splat(0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::uint32_t words[4] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = ptx::unpack<T>(words[j]);
        sum[2 * j] += pair.x, sum[2 * j + 1] += pair.y;
      }
    }
  }
  float4* totals =
      reinterpret_cast<float4*>(sums.totals) + head_row * (sizes.head_dim / 4) + (has_chunk ? 2 * lane : 0);
  if (!sums.first && has_chunk) {
    const float4 low = totals[0], high = totals[1];
    sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
    sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
  }
  if (!sums.last) {
    if (!has_chunk) return;
    totals[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    totals[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    return;
  }
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = ptx::pack<T>(sum[2 * i], sum[2 * i + 1]);
  quad_transpose(words, lane);
  if (!has_chunk) return;
  const int q_head = (sizes.head_begin + head) * sizes.group + row - token_in_slab * sizes.group;
  uint4* to = reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(dq.data) +
                                       static_cast<std::int64_t>(token) * dq.token_stride + q_head * dq.head_stride) +
              lane;
  __stcs(to, invalid ? splat(kNanPair) : make_uint4(words[0], words[1], words[2], words[3]));
}

template <class T, bool kParts>
auto sum_kernel(int head_dim) {
  return head_dim <= 64 ? sum_rows<T, 8, kParts> : head_dim <= 128 ? sum_rows<T, 16, kParts> : sum_rows<T, 32, kParts>;
}

template <class T>
auto value_kernel(int head_dim) {
  return head_dim <= 64 ? value_rows<T, 8> : head_dim <= 128 ? value_rows<T, 16> : value_rows<T, 32>;
}

}  // namespace

std::int64_t row_value_count(const Shape& shape, Slab slab) {
  return std::int64_t{slab.heads} * slab.tokens * shape.group + 1;
}

void row_values(const Shape& shape, Slab slab, View<const void> out, View<const void> dout, View<const void> lse,
                const RowValues& values, cudaStream_t stream) {
  const Heads heads{slab.head_begin * shape.group,
                    slab.heads * shape.group,
                    slab.token_begin,
                    slab.tokens,
                    shape.group,
                    shape.head_dim};
  const int rows_of_cta = kThreads / lanes_of(shape.head_dim);
  const std::int64_t ctas = (row_value_count(shape, slab) + rows_of_cta - 1) / rows_of_cta;
  launch(
      shape.dtype == DType::bf16 ? value_kernel<__nv_bfloat16>(shape.head_dim) : value_kernel<__half>(shape.head_dim),
      dim3(static_cast<unsigned>(ctas)), kThreads, 0, stream, heads, out, dout, lse, values);
}

void sum_queries(const Shape& shape, Slab slab, Batch batch, const Pass& pass, const QuerySums& sums, View<void> dq,
                 cudaStream_t stream) {
  const bool dense = sums.ids.data == nullptr;
  const Sizes sizes{slab.head_begin,
                    slab.token_begin,
                    slab.tokens * shape.group,
                    shape.group,
                    dense ? 1 : shape.slots,
                    shape.head_dim,
                    shape.max_blocks,
                    shape.batch,
                    dense ? std::numeric_limits<int>::max() : shape.block_size,
                    shape.causal,
                    dense};
  const bool parts = dense || shape.block_size > pass.part_keys;
  const auto kernel = [&]<class T>(T) {
    return parts ? sum_kernel<T, true>(shape.head_dim) : sum_kernel<T, false>(shape.head_dim);
  };
  launch(shape.dtype == DType::bf16 ? kernel(__nv_bfloat16{}) : kernel(__half{}),
         dim3(divide_up(sizes.rows, kThreads / lanes_of(shape.head_dim)), slab.heads), kThreads, 0, stream, sizes, pass,
         batch, sums, dq);
}

}  // namespace moba::cuda
