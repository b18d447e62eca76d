// Units of dense attention: all rows of a (key head, sequence) against the keys that the last of them sees; for
// backward those that see a part of the keys, against that.
#include <algorithm>

#include "cuda/contract.h"
#include "cuda/lanes.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/unit_lists.cuh"

namespace moba::cuda {
namespace cutting {
namespace {

// The rows of one sequence that see a key, and how they are cut.
struct DenseRows {
  int first_token;  // the query token at the position of the first key
  int row0;         // first row that sees a key
  int rows, units;
};

struct Dense {
  int batch, group, rows_per_unit, kv_heads, heads_per_section;
  bool causal;
  std::int64_t capacity;
};

__device__ __forceinline__ DenseRows dense_rows(const Dense& dense, const DeviceSequence& s) {
  const int unseeing = !dense.causal ? 0 : max(0, s.q_len - s.k_len);  // queries before the first key
  const int queries = s.k_len == 0 ? 0 : s.q_len - unseeing;
  const int rows = queries * dense.group;
  const unsigned most = static_cast<unsigned>(dense.rows_per_unit);
  return {s.q_begin + s.q_len - s.k_len, (s.q_begin + unseeing) * dense.group, rows,
          static_cast<int>((static_cast<unsigned>(rows) + most - 1) / most)};
}

__device__ __forceinline__ Unit dense_unit(const Dense& dense, const DeviceSequence& s, const DenseRows& r, int head,
                                           int u) {
  Unit unit;
  unit.first = 0;
  unit.head = head;
  unit.key_begin = s.k_begin;
  unit.row0 = r.row0 + u * dense.rows_per_unit;
  unit.rows = min(dense.rows_per_unit, r.rows - u * dense.rows_per_unit);
  unit.first_token = r.first_token;
  unit.keys = s.k_len;
  unit.masked = 0;
  if (dense.causal) {
    const int last_token = (unit.row0 + unit.rows - 1) / dense.group;
    unit.keys = last_token - r.first_token + 1;
    unit.masked = max(0, last_token * dense.group - unit.row0);
  }
  return unit;
}

// Calls f(sequence, its rows, unit) for each unit of one key head, spread over the threads: whole CTAs on a sequence
// where there are few of them, else a warp on each.
template <class F>
__device__ __forceinline__ void for_each_dense_unit(const Dense& dense, const Batch& batch, F&& f) {
  const int team = dense.batch < 32 ? kThreads : 32, thread = static_cast<int>(threadIdx.x);
  for (int s = thread / team; s < dense.batch; s += kThreads / team) {
    const DeviceSequence sequence = batch.sequences[s];
    const DenseRows rows = dense_rows(dense, sequence);
    for (int u = thread % team; u < rows.units; u += team) f(sequence, rows, u);
  }
}

// A CTA a key head. Heads go in sections whose keys and values fit in L2 together; in a section the units with the most
// keys come first, each for all its heads.
__global__ void __launch_bounds__(kThreads) cut_sequences(Dense dense, Batch batch, UnitList list) {
  ptx::start_behind_previous();
  __shared__ int counts[kClasses], next[kClasses], longest, units;
  const int head = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  if (thread < kClasses) counts[thread] = 0;
  if (thread == 0) longest = 1, units = 0;
  __syncthreads();
  int most = 0;
  for (int s = thread; s < dense.batch; s += kThreads) most = max(most, batch.sequences[s].k_len);
  most = __reduce_max_sync(kAllLanes, most);
  if (most > 0 && thread % 32 == 0) atomicMax(&longest, most);
  __syncthreads();
  const unsigned class_keys = static_cast<unsigned>(longest) / kClasses + 1;
  const auto class_of_unit = [&](const Unit& unit) {
    return static_cast<int>(static_cast<unsigned>(longest - unit.keys) / class_keys);
  };
  for_each_dense_unit(dense, batch, [&](const DeviceSequence& s, const DenseRows& r, int u) {
    atomicAdd(&counts[class_of_unit(dense_unit(dense, s, r, head, u))], 1);
  });
  __syncthreads();
  scan_classes(counts, 0, next);
  if (thread < kClasses) atomicAdd(&units, counts[thread]);
  __syncthreads();

  const int section = head / dense.heads_per_section, section_head = section * dense.heads_per_section;
  const int heads = min(dense.heads_per_section, dense.kv_heads - section_head);
  const std::int64_t base = static_cast<std::int64_t>(section_head) * units;
  for_each_dense_unit(dense, batch, [&](const DeviceSequence& s, const DenseRows& r, int u) {
    const Unit unit = dense_unit(dense, s, r, head, u);
    const std::int64_t place =
        base + static_cast<std::int64_t>(atomicAdd(&next[class_of_unit(unit)], 1)) * heads + head - section_head;
    if (place < dense.capacity) list.units[place] = unit;
  });
  if (head == 0 && thread == 0) {
    list.counters[0] = 0;
    list.counters[1] = static_cast<int>(min(dense.capacity, static_cast<std::int64_t>(units) * dense.kv_heads));
  }
}

// The rows of the slab that see part i % parts of sequence i / parts.
struct DensePartLists : ListsOfHeads {
  const DeviceSequence* sequences;
  int token_begin, tokens;
  int part_keys, part_begin, parts;

  struct Span {
    int first_key, first_token;  // of the part; the query token at the position of that key
    int begin, end;              // query tokens
  };
  __device__ Span span(const DeviceSequence& s, int i) const {
    const int first_key = (part_begin + i % parts) * part_keys, first_token = s.q_begin + s.q_len - s.k_len + first_key;
    const int begin = max(max(s.q_begin, token_begin), causal ? first_token : 0);
    return {first_key, first_token, begin,
            first_key < s.k_len ? min(s.q_begin + s.q_len, token_begin + tokens) : begin};
  }
  __device__ int rows(int, int i) const {
    const Span of = span(sequences[i / parts], i);
    return max(0, of.end - of.begin) * group;
  }
  __device__ Unit whole(int head, int i) const {
    const DeviceSequence s = sequences[i / parts];
    const Span of = span(s, i);
    Unit unit;
    unit.first = (static_cast<std::int64_t>(head) * tokens + of.begin - token_begin) * group;
    unit.head = head_begin + head;
    unit.key_begin = s.k_begin + of.first_key;
    unit.keys = min(part_keys, s.k_len - of.first_key);
    unit.rows = (of.end - of.begin) * group;
    unit.first_token = of.first_token;
    unit.masked = causal ? max(0, min(of.end, of.first_token + unit.keys - 1) - of.begin) * group : 0;
    unit.row0 = of.begin * group;
    unit.part = i % parts;
    return unit;
  }
};

HeadTotal dense_total_of(const Shape& shape, Slab slab, const Pass& pass) {
  const std::int64_t parts = pass.parts;
  return {parts * shape.batch, parts * slab.tokens * shape.group};
}

}  // namespace
}  // namespace cutting

using namespace cutting;

std::int64_t dense_unit_capacity(const Shape& shape, int rows_per_unit) {
  return shape.kv_heads *
         most_units(shape.batch, static_cast<std::int64_t>(shape.total_q) * shape.group, rows_per_unit);
}

std::int64_t dense_backward_unit_capacity(const Shape& shape, Slab slab, const Pass& pass) {
  return backward_units(slab, pass.sections, dense_total_of(shape, slab, pass));
}

ShareCapacity dense_share_capacity(const Shape& shape, Slab slab, const Pass& pass) {
  return backward_shares(slab, pass.sections, dense_total_of(shape, slab, pass));
}

void list_dense_units(const Shape& shape, Batch batch, int rows_per_unit, const UnitList& list, cudaStream_t stream) {
  constexpr std::int64_t kSectionBytes = std::int64_t{32} << 20;
  const std::int64_t head_bytes = std::int64_t{4} * shape.total_k * shape.head_dim;  // k and v
  const int heads = static_cast<int>(
      std::clamp<std::int64_t>(kSectionBytes / std::max<std::int64_t>(1, head_bytes), 1, shape.kv_heads));
  const Dense dense{shape.batch,
                    shape.group,
                    rows_per_unit,
                    shape.kv_heads,
                    heads,
                    shape.causal,
                    dense_unit_capacity(shape, rows_per_unit)};
  launch(Start::early, cut_sequences, dim3(shape.kv_heads), kThreads, 0, stream, dense, batch, list);
}

void list_dense_backward_units(Start start, const Shape& shape, Slab slab, Batch batch, const Pass& pass,
                               const UnitList& list, const ShareList& shares, cudaStream_t stream) {
  const ListsOfHeads heads =
      backward_heads(shape, slab, pass, dense_total_of(shape, slab, pass), shape.batch * pass.parts);
  launch_cut(start,
             DensePartLists{heads, batch.sequences, slab.token_begin, slab.tokens, pass.part_keys, pass.part_begin,
                            pass.parts},
             shape.sm_count, nullptr, list, shares, stream);
}

}  // namespace moba::cuda
