// sum_queries(): dq of rows from the partials that the products of backward left.
#include <limits>

#include "cuda/batch.cuh"
#include "cuda/chunk.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // partial rows in flight a lane

struct Rows {
  int head_begin, token_begin, rows;  // rows of a key head of the slab
  int group, slots, head_dim, max_blocks, batch;
  int block_size;  // of dense: more than any sequence has keys
  bool causal, dense;
};

// Where the partials of one row stand. kParts: blocks may have several parts; else each has one, all of this pass.
template <bool kParts>
class Entries {
 public:
  // Of slab row `row`, of query token `token`, of key head `head` of the slab. A row that is none has no entries.
  __device__ Entries(const Rows& rows, const Pass& pass, const Batch& batch, const QuerySums& sums, int head, int row,
                     int token, bool is_row)
      : rows_(rows), pass_(pass), stride_(sums.part_stride), token_(token), none_(!is_row) {
    const std::int64_t head_row = static_cast<std::int64_t>(head) * rows.rows + row;
    first_ = head_row;
    if (!rows.dense) {
      const int token_in_slab = token - rows.token_begin;
      positions_ = sums.index.positions + head_row * rows.slots;
      first_ = sums.index.offsets[static_cast<std::int64_t>(head) * rows.max_blocks];
      invalid_ = __ldg(positions_) == kInvalidRow;
      ids_ = sums.ids.data + head * sums.ids.head_stride + token_in_slab * sums.ids.token_stride +
             (row - token_in_slab * rows.group) * sums.ids.group_stride;
    }
    if constexpr (kParts) {
      const int number = find_sequence(batch, rows.batch, token);
      invalid_ = invalid_ || number < 0;
      if (number >= 0) sequence_ = batch.sequences[number];
    }
    none_ = none_ || invalid_;
  }

  __device__ bool invalid() const { return invalid_; }
  __device__ int count() const { return rows_.slots * (kParts ? pass_.parts : 1); }
  // That entries count from.
  __device__ std::int64_t first() const { return first_; }
  // Entry i, counted part after part and slot after slot in each; -1 for none.
  __device__ std::int64_t operator()(int i) const {
    const int part = kParts ? i / rows_.slots : 0, slot = i - part * rows_.slots;
    if (none_ || i >= count()) return -1;
    const int position = rows_.dense ? 0 : __ldg(positions_ + slot);
    if (position < 0) return -1;
    if (kParts && part >= parts_seen(rows_.dense ? 0 : __ldg(ids_ + slot))) return -1;
    return position + part * stride_;
  }

 private:
  // How many partials of the pass block `id` has for the row: one for each part that the row sees.
  __device__ int parts_seen(int id) const {
    const DeviceSequence& s = sequence_;
    const std::int64_t start = static_cast<std::int64_t>(id) * rows_.block_size;
    const int end = rows_.causal ? min(s.k_len, s.k_len - s.q_len + token_ - s.q_begin + 1) : s.k_len;
    const int keys = static_cast<int>(min(max(end - start, std::int64_t{0}), std::int64_t{rows_.block_size}));
    return min(pass_.parts, max(0, (keys + pass_.part_keys - 1) / pass_.part_keys - pass_.part_begin));
  }

  const Rows& rows_;
  const Pass& pass_;
  std::int64_t stride_, first_;
  int token_;
  bool none_, invalid_ = false;
  const std::int32_t *positions_ = nullptr, *ids_ = nullptr;
  DeviceSequence sequence_{};
};

// The sum of this lane's chunks of a row's partials; `chunks` is that of entry 0, `pitch` of them from a row to the
// next.
template <class T, int kGroup, bool kParts>
__device__ __forceinline__ void add_partials(float (&sum)[8], const Entries<kParts>& entries, const uint4* chunks,
                                             int pitch, bool has_chunk) {
  for (int first = 0; first < entries.count(); first += kLoads) {
    const std::int64_t mine = entries(first + static_cast<int>(threadIdx.x) % kLoads);
    uint4 chunk[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t entry = __shfl_sync(kAllLanes, mine, i, kGroup);
      chunk[i] = entry >= 0 && has_chunk ? __ldcs(chunks + entry * pitch) : splat(0);
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
}

__device__ __forceinline__ void add_totals(float (&sum)[8], const float4* totals) {
  const float4 low = totals[0], high = totals[1];
  sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
  sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
}

// The row of this lane's group, of which d / 8 lanes have a chunk of 16 bytes.
template <class T, int kGroup, bool kParts>
__device__ __forceinline__ void sum_row(const Rows& rows, const Pass& pass, const Batch& batch, const QuerySums& sums,
                                        const View<void>& dq) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup, head = static_cast<int>(blockIdx.y);
  const int asked = static_cast<int>(blockIdx.x) * (kThreads / kGroup) + static_cast<int>(threadIdx.x) / kGroup;
  const bool is_row = asked < rows.rows, has_chunk = is_row && lane * 8 < rows.head_dim;
  const int row = is_row ? asked : 0, token_in_slab = row / rows.group, token = rows.token_begin + token_in_slab;
  const int pitch = rows.head_dim / 8, chunk = has_chunk ? lane : 0;
  const Entries<kParts> entries(rows, pass, batch, sums, head, row, token, is_row);
  float sum[8] = {};
  add_partials<T, kGroup>(sum, entries, static_cast<const uint4*>(sums.partials) + entries.first() * pitch + chunk,
                          pitch, has_chunk);
  float4* totals = reinterpret_cast<float4*>(sums.totals) +
                   2 * ((static_cast<std::int64_t>(head) * rows.rows + row) * pitch + chunk);
  if (!sums.first && has_chunk) add_totals(sum, totals);
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
  const int q_head = (rows.head_begin + head) * rows.group + row - token_in_slab * rows.group;
  uint4* to = reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(dq.data) +
                                       static_cast<std::int64_t>(token) * dq.token_stride + q_head * dq.head_stride);
  __stcs(to + lane, entries.invalid() ? splat(kNanPair) : make_uint4(words[0], words[1], words[2], words[3]));
}

// kGroup lanes a row; grid: (rows, heads of the slab).
template <class T, int kGroup, bool kParts>
__global__ void __launch_bounds__(kThreads, 4)
    sum_rows(Rows rows, Pass pass, Batch batch, QuerySums sums, View<void> dq) {
  ptx::let_next_start();
  sum_row<T, kGroup, kParts>(rows, pass, batch, sums, dq);
  ptx::end_behind_previous();
}

template <class T, bool kParts>
auto sum_kernel(int head_dim) {
  return with_lanes(head_dim, [](auto lanes) { return sum_rows<T, lanes(), kParts>; });
}

}  // namespace

void sum_queries(const Shape& shape, Slab slab, Batch batch, const Pass& pass, const QuerySums& sums, View<void> dq,
                 cudaStream_t stream) {
  const bool dense = sums.ids.data == nullptr;
  const Rows rows{slab.head_begin,
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
  launch(Start::beside, shape.dtype == DType::bf16 ? kernel(__nv_bfloat16{}) : kernel(__half{}),
         dim3(divide_up(rows.rows, kThreads / lanes_of(shape.head_dim)), slab.heads), kThreads, 0, stream, rows, pass,
         batch, sums, dq);
}

}  // namespace moba::cuda
