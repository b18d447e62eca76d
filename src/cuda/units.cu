// Work units of attend. The lists of (key head, block) are cut into units of nearly equal size, those of a key head
// written long ones first, so that the SMs run out of work together; dense attention cuts the rows of each (key head,
// sequence).
//
// Neither step has scratch memory: every CTA counts all lists anew (64 KB of offsets at 16 heads x 512 blocks, from L2)
// to know where its own units go. Within a class of size the order is that of atomic counters; no result depends on it.
#include <algorithm>

#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/scan.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kClasses = 64;       // of size, the largest first
constexpr int kTile = 64;          // rows; units but the last of a list are whole tiles
constexpr int kListsPerCta = 128;  // at least

// How a list is cut: units - 1 of `step` rows and one of `last` rows.
struct Cut {
  int units, step, last;
};

__device__ __forceinline__ Cut cut(int rows, int rows_per_unit) {
  if (rows <= rows_per_unit) return {rows > 0 ? 1 : 0, rows, rows};
  const unsigned n = static_cast<unsigned>(rows), most = static_cast<unsigned>(rows_per_unit);
  const unsigned pieces = (n + most - 1) / most;
  const unsigned step = ((n + pieces - 1) / pieces + kTile - 1) / kTile * kTile, units = (n + step - 1) / step;
  return {static_cast<int>(units), static_cast<int>(step), static_cast<int>(n - (units - 1) * step)};
}

__device__ __forceinline__ int class_of(int rows, int rows_per_unit) {
  const int width = max(kTile, (rows_per_unit + kClasses - 1) / kClasses);
  return (rows_per_unit - rows) / width;
}

// Turns counts of classes into the place of the first unit of each: classes in order, `base` before all.
__device__ __forceinline__ void scan_classes(const int* counts, int base, int* first) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int before;
    const int low = scan_warp(counts[lane], &before), high = scan_warp<int>(counts[lane + 32], nullptr);
    first[lane] = base + low;
    first[lane + 32] = base + before + high;
  }
}

struct Lists {
  int head_begin, heads, max_blocks, group, rows_per_unit;
  bool causal;
  std::int64_t capacity;
};

// Rows of the ascending `rows` [count] below `limit`, where the first of them is `row0`. Mostly they are all of row0 ..
// limit - 1, those of the own block: one look tells.
__device__ __forceinline__ int rows_below(const std::int32_t* rows, int count, int row0, std::int64_t limit) {
  int low = 0, high = static_cast<int>(min(static_cast<std::int64_t>(count), max(limit - row0, std::int64_t{0})));
  if (high == 0 || rows[high - 1] < limit) return high;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (rows[middle] < limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Grid: (parts of the blocks, heads).
__global__ void __launch_bounds__(kThreads, 1)
    cut_lists(Lists lists, const DeviceBlock* blocks, const std::int64_t* offsets, const std::int32_t* rows,
              UnitList list) {
  __shared__ int counts[kClasses], mine[kClasses], next[kClasses], units_before, units_behind;
  const int head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int n = lists.max_blocks, per_part = (n + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int begin = min(n, static_cast<int>(blockIdx.x) * per_part), end = min(n, begin + per_part);
  if (thread < kClasses) counts[thread] = mine[thread] = 0;
  if (thread == 0) units_before = units_behind = 0;
  __syncthreads();

  const auto cut_of = [&](std::int64_t i) {
    return cut(static_cast<int>(offsets[i + 1] - offsets[i]), lists.rows_per_unit);
  };
  const auto count_units = [&](std::int64_t first, std::int64_t last, int* total) {
    int sum = 0;
#pragma unroll 8
    for (std::int64_t i = first + thread; i < last; i += kThreads) sum += cut_of(i).units;
    sum = __reduce_add_sync(kAllLanes, sum);
    if (sum != 0 && thread % 32 == 0) atomicAdd(total, sum);
  };
  // Heads before this one; behind it only the first CTA counts, to know the sum of all.
  count_units(0, static_cast<std::int64_t>(head) * n, &units_before);
  const bool counts_all = blockIdx.x == 0 && head == 0;
  if (counts_all) count_units(n, static_cast<std::int64_t>(lists.heads) * n, &units_behind);
  // This head: all units by class, and those of the blocks before this part.
  const std::int64_t first_list = static_cast<std::int64_t>(head) * n;
  for (int b = thread; b < n; b += kThreads) {
    const Cut c = cut_of(first_list + b);
    if (c.units == 0) continue;
    const int last = class_of(c.last, lists.rows_per_unit);
    atomicAdd(&counts[last], 1);
    if (b < begin) atomicAdd(&mine[last], 1);
    if (c.units > 1) {
      const int whole = class_of(c.step, lists.rows_per_unit);
      atomicAdd(&counts[whole], c.units - 1);
      if (b < begin) atomicAdd(&mine[whole], c.units - 1);
    }
  }
  __syncthreads();
  scan_classes(counts, units_before, next);
  if (counts_all && thread < 32) {
    int low, high;
    scan_warp(counts[thread], &low);
    scan_warp(counts[thread + 32], &high);
    if (thread == 0) {
      list.counters[0] = 0;
      list.counters[1] = static_cast<int>(min(lists.capacity, static_cast<std::int64_t>(low) + high + units_behind));
    }
  }
  __syncthreads();
  if (thread < kClasses) next[thread] += mine[thread];
  __syncthreads();

  for (int b = begin + thread; b < end; b += kThreads) {
    const std::int64_t first = offsets[first_list + b];
    const Cut c = cut_of(first_list + b);
    if (c.units == 0) continue;
    const DeviceBlock block = blocks[b];
    // Rows ascend, so those that do not see all keys come first.
    int masked_rows = 0;
    bool consecutive = false;  // whether they all are
    const int row0 = rows[first];
    if (lists.causal) {
      const std::int64_t sees_all = static_cast<std::int64_t>(block.first_token) + block.keys - 1;
      masked_rows = rows_below(rows + first, (c.units - 1) * c.step + c.last, row0, sees_all * lists.group);
      consecutive = masked_rows > 0 && masked_rows == sees_all * lists.group - row0;
    }
    const int whole = class_of(c.step, lists.rows_per_unit);
    int place = c.units > 1 ? atomicAdd(&next[whole], c.units - 1) : 0;
    for (int u = 0; u < c.units; ++u, ++place) {
      if (u == c.units - 1) place = atomicAdd(&next[class_of(c.last, lists.rows_per_unit)], 1);
      Unit unit;
      unit.first = first + static_cast<std::int64_t>(u) * c.step;
      unit.head = lists.head_begin + head;
      unit.key_begin = block.key_begin;
      unit.keys = block.keys;
      unit.rows = u == c.units - 1 ? c.last : c.step;
      unit.first_token = block.first_token;
      unit.masked = min(max(masked_rows - u * c.step, 0), unit.rows);
      unit.row0 = -1;
      if (unit.masked > 0 && consecutive) {
        unit.row0 = row0 + u * c.step;
      } else if (unit.masked > 0) {
        const int row = rows[unit.first];
        if (rows[unit.first + unit.masked - 1] - row == unit.masked - 1) unit.row0 = row;
      }
      if (place < lists.capacity) list.units[place] = unit;
    }
  }
}

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

// `rows` rows in at most `lists` lists: a list of c > 0 rows has at most (c - 1) / rows_per_unit + 1 units.
std::int64_t most_units(std::int64_t lists, std::int64_t rows, int rows_per_unit) {
  const std::int64_t filled = std::min(lists, rows);
  return filled + (rows - filled) / rows_per_unit;
}

}  // namespace

std::int64_t unit_capacity(const Shape& shape, Slab slab, int rows_per_unit) {
  return most_units(static_cast<std::int64_t>(slab.heads) * shape.max_blocks,
                    static_cast<std::int64_t>(slab.heads) * slab.tokens * shape.group * shape.slots, rows_per_unit);
}

std::int64_t dense_unit_capacity(const Shape& shape, int rows_per_unit) {
  return shape.kv_heads *
         most_units(shape.batch, static_cast<std::int64_t>(shape.total_q) * shape.group, rows_per_unit);
}

void list_units(const Shape& shape, Slab slab, Batch batch, const Index& index, int rows_per_unit, const UnitList& list,
                cudaStream_t stream) {
  const Lists lists{slab.head_begin,
                    slab.heads,
                    shape.max_blocks,
                    shape.group,
                    rows_per_unit,
                    shape.causal,
                    unit_capacity(shape, slab, rows_per_unit)};
  const int wanted = divide_up(shape.max_blocks, kListsPerCta);
  const int parts = std::clamp(wanted, 1, std::max(1, 2 * shape.sm_count / std::max(1, slab.heads)));
  launch(cut_lists, dim3(parts, std::max(1, slab.heads)), kThreads, 0, stream, lists, batch.blocks, index.offsets,
         index.rows, list);
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
  launch(cut_sequences, dim3(shape.kv_heads), kThreads, 0, stream, dense, batch, list);
}

}  // namespace moba::cuda
