// How lists of rows are cut into units of nearly equal size. Key heads go in sections, in which long units come first,
// and those of the last section may be cut smaller, so that the SMs run out of work together.
//
// There is no scratch memory: every CTA counts all lists anew (64 KB of offsets at 16 heads x 512 blocks, from L2) to
// know where its own units go. Within a class of size the order is that of atomic counters; no result depends on it.
#pragma once

#include <algorithm>

#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/scan.cuh"

namespace moba::cuda::cutting {

inline constexpr int kThreads = 1024;
inline constexpr int kClasses = 64;       // of size, the largest first
inline constexpr int kTile = 64;          // rows; units but the last of a list are whole tiles
inline constexpr int kListsPerCta = 128;  // at least

// How a list is cut: units - 1 of `step` rows and one of `last` rows.
struct Cut {
  int units, step, last;
};

__device__ __forceinline__ Cut cut(int rows, int most_rows) {
  if (rows <= most_rows) return {rows > 0 ? 1 : 0, rows, rows};
  const unsigned n = static_cast<unsigned>(rows), most = static_cast<unsigned>(most_rows);
  const unsigned pieces = (n + most - 1) / most;
  const unsigned step = ((n + pieces - 1) / pieces + kTile - 1) / kTile * kTile, units = (n + step - 1) / step;
  return {static_cast<int>(units), static_cast<int>(step), static_cast<int>(n - (units - 1) * step)};
}

__device__ __forceinline__ int class_of(int rows, int most_rows) {
  const int width = max(kTile, (most_rows + kClasses - 1) / kClasses);
  return (most_rows - rows) / width;
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

// What cut_lists() cuts: `count` lists of each of `heads` key heads. whole(head, i) is list i of a head of the slab as
// one unit, rows(head, i) how many rows it has, which may be 0.
struct ListsOfHeads {
  int head_begin, heads, count;
  int group;
  bool causal;
  std::int64_t capacity;  // units
  Sections sections;
  int last_section;  // its first head

  // Rows that a unit of a head of the slab has at most.
  __device__ int most_rows(int head) const {
    return head < last_section ? sections.most_rows : sections.last_most_rows;
  }
};

// Unit u of a list that is cut, from the whole. `row_ids` null: all rows are consecutive.
__device__ __forceinline__ Unit piece_of(const Unit& whole, const Cut& c, int u, const std::int32_t* row_ids) {
  Unit unit = whole;
  const int before = u * c.step;
  unit.first += before;
  unit.rows = u == c.units - 1 ? c.last : c.step;
  unit.masked = min(max(whole.masked - before, 0), unit.rows);
  if (row_ids == nullptr) {
    unit.row0 += before;
  } else if (unit.masked > 0 && whole.row0 >= 0) {
    unit.row0 += before;
  } else if (unit.masked > 0) {
    const int row = row_ids[unit.first];
    if (row_ids[unit.first + unit.masked - 1] - row == unit.masked - 1) unit.row0 = row;
  }
  return unit;
}

// Where the units of a list put dk and dv. -1: in their final place.
__device__ __forceinline__ int first_share(const ShareList& list, const Unit& whole, int units) {
  if (list.counters == nullptr || units == 1) return -1;
  const int first = atomicAdd(list.counters, units);
  list.splits[atomicAdd(list.counters + 1, 1)] = {first, units, whole.head, whole.key_begin, whole.keys};
  return first;
}

// Grid: (parts of the lists, heads). `row_ids` as in piece_of.
template <class Lists>
__global__ void __launch_bounds__(kThreads, 1)
    cut_lists(Start start, Lists lists, const std::int32_t* row_ids, UnitList list, ShareList share_list) {
  start == Start::early ? ptx::start_behind_previous() : ptx::let_next_start();
  __shared__ int counts[kClasses], mine[kClasses], next[kClasses], units_before, units_behind;
  const int head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int n = lists.count, per_part = (n + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int begin = min(n, static_cast<int>(blockIdx.x) * per_part), end = min(n, begin + per_part);
  if (thread < kClasses) counts[thread] = mine[thread] = 0;
  if (thread == 0) units_before = units_behind = 0;
  __syncthreads();

  const auto cut_of = [&](int h, int i) { return cut(lists.rows(h, i), lists.most_rows(h)); };
  // Calls f(head, list) for all lists of the heads [first, last), spread over the threads.
  const auto for_each_list = [&](int first, int last, auto f) {
    if (n == 0) return;
    const int more_heads = kThreads / n, more_lists = kThreads - more_heads * n;
    int h = first + thread / n, i = thread % n;
#pragma unroll 8
    while (h < last) {
      f(h, i);
      h += more_heads, i += more_lists;
      if (i >= n) ++h, i -= n;
    }
  };
  const auto count_units = [&](int first, int last, int* total) {
    int sum = 0;
    for_each_list(first, last, [&](int h, int i) { sum += cut_of(h, i).units; });
    sum = __reduce_add_sync(kAllLanes, sum);
    if (sum != 0 && thread % 32 == 0) atomicAdd(total, sum);
  };
  // Sections before this one; behind it only the first CTA counts, to know the sum of all.
  const int section = head / lists.sections.heads * lists.sections.heads;
  const int section_end = min(lists.heads, section + lists.sections.heads), most_rows = lists.most_rows(head);
  count_units(0, section, &units_before);
  const bool counts_all = blockIdx.x == 0 && head == 0;
  if (counts_all) count_units(section_end, lists.heads, &units_behind);
  // This section: all units by class, and those of the lists before this part.
  for_each_list(section, section_end, [&](int h, int i) {
    const Cut c = cut_of(h, i);
    if (c.units == 0) return;
    const bool before = h < head || (h == head && i < begin);
    const auto add = [&](int rows, int units) {
      const int class_number = class_of(rows, most_rows);
      atomicAdd(&counts[class_number], units);
      if (before) atomicAdd(&mine[class_number], units);
    };
    add(c.last, 1);
    if (c.units > 1) add(c.step, c.units - 1);
  });
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

  for (int i = begin + thread; i < end; i += kThreads) {
    const Cut c = cut_of(head, i);
    if (c.units == 0) continue;
    const Unit all = lists.whole(head, i);
    const int share = first_share(share_list, all, c.units);
    int place = c.units > 1 ? atomicAdd(&next[class_of(c.step, most_rows)], c.units - 1) : 0;
    for (int u = 0; u < c.units; ++u, ++place) {
      if (u == c.units - 1) place = atomicAdd(&next[class_of(c.last, most_rows)], 1);
      Unit unit = piece_of(all, c, u, row_ids);
      unit.share = share < 0 ? -1 : share + u;
      if (place < lists.capacity) list.units[place] = unit;
    }
  }
  ptx::end_behind_previous();
}

// ---- Host ----

// `rows` rows in at most `lists` lists: a list of c > 0 rows has at most (c - 1) / most_rows + 1 units.
inline std::int64_t most_units(std::int64_t lists, std::int64_t rows, int most_rows) {
  const std::int64_t filled = std::min(lists, rows);
  return filled + (rows - filled) / most_rows;
}

// Of `heads` key heads, the first of the last section.
inline int last_section(int heads, const Sections& sections) {
  return std::max(0, heads - 1) / sections.heads * sections.heads;
}

// What a pass of backward has to cut: lists of each key head, and the rows in them.
struct HeadTotal {
  std::int64_t lists, rows;
};

// f(lists, rows, most rows of a unit) of all sections but the last and of the last, added up. The last is counted as if
// it were whole: so a part of the slab, of which more may be last, has no more units than the slab.
template <class F>
std::int64_t over_sections(Slab slab, const Sections& sections, const HeadTotal& head, const F& f) {
  const std::int64_t last = std::min(slab.heads, sections.heads), before = slab.heads - last;
  return f(before * head.lists, before * head.rows, sections.most_rows) +
         f(last * head.lists, last * head.rows, sections.last_most_rows);
}

inline std::int64_t backward_units(Slab slab, const Sections& sections, const HeadTotal& head) {
  return over_sections(slab, sections, head, most_units);
}

// Lists of more than most_rows rows are cut, into at most rows / most_rows + 1 units each.
inline ShareCapacity backward_shares(Slab slab, const Sections& sections, const HeadTotal& head) {
  const auto splits = [](std::int64_t lists, std::int64_t rows, int most_rows) {
    return std::min(lists, rows / (most_rows + 1));
  };
  const auto shares = [&](std::int64_t lists, std::int64_t rows, int most_rows) {
    return rows / most_rows + splits(lists, rows, most_rows);
  };
  return {over_sections(slab, sections, head, shares), over_sections(slab, sections, head, splits)};
}

inline ListsOfHeads backward_heads(const Shape& shape, Slab slab, const Pass& pass, const HeadTotal& head, int lists) {
  return {slab.head_begin, slab.heads,
          lists,           shape.group,
          shape.causal,    backward_units(slab, pass.sections, head),
          pass.sections,   last_section(slab.heads, pass.sections)};
}

template <class Lists>
void launch_cut(Start start, const Lists& lists, int sm_count, const std::int32_t* row_ids, const UnitList& list,
                const ShareList& shares, cudaStream_t stream) {
  const int wanted = divide_up(lists.count, kListsPerCta);
  const int parts = std::clamp(wanted, 1, std::max(1, 2 * sm_count / std::max(1, lists.heads)));
  launch(start, cut_lists<Lists>, dim3(parts, std::max(1, lists.heads)), kThreads, 0, stream, start, lists, row_ids,
         list, shares);
}

}  // namespace moba::cuda::cutting
