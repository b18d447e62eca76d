// Units of the lists of (key head, block), and for backward of (key head, part of a block).
#include <algorithm>

#include "cuda/contract.h"
#include "cuda/unit_lists.cuh"

namespace moba::cuda {
namespace cutting {
namespace {

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

// The rows that chose a block.
struct ChosenLists : ListsOfHeads {
  const DeviceBlock* blocks;
  const std::int64_t* offsets;
  const std::int32_t* row_ids;

  __device__ int rows(int head, int i) const {
    const std::int64_t* list = offsets + static_cast<std::int64_t>(head) * count + i;
    return static_cast<int>(list[1] - list[0]);
  }
  // The unit of the rows of list `list` against `block`, or the part of one.
  __device__ Unit unit_of(int head, std::int64_t list, int rows_of_list, const DeviceBlock& block) const {
    Unit unit;
    unit.first = offsets[list];
    unit.head = head_begin + head;
    unit.key_begin = block.key_begin;
    unit.keys = block.keys;
    unit.rows = rows_of_list;
    unit.first_token = block.first_token;
    unit.masked = 0;
    unit.row0 = -1;
    if (!causal) return unit;
    // Rows ascend, so those that do not see all keys come first.
    const int row0 = row_ids[unit.first];
    const std::int64_t limit = (static_cast<std::int64_t>(block.first_token) + block.keys - 1) * group;
    unit.masked = rows_below(row_ids + unit.first, unit.rows, row0, limit);
    if (unit.masked > 0 && unit.masked == limit - row0) unit.row0 = row0;
    return unit;
  }
  __device__ Unit whole(int head, int i) const {
    return unit_of(head, static_cast<std::int64_t>(head) * count + i, rows(head, i), blocks[i]);
  }
};

// The same against each part of the block that a pass of backward takes: list i is part i % parts of block i / parts.
struct PartLists : ChosenLists {
  int max_blocks, part_keys, part_begin, parts;

  __device__ int first_key(int i) const { return (part_begin + i % parts) * part_keys; }
  __device__ std::int64_t list(int head, int i) const {
    return static_cast<std::int64_t>(head) * max_blocks + i / parts;
  }
  __device__ int rows(int head, int i) const {
    const std::int64_t* begin = offsets + list(head, i);
    const int first = first_key(i);
    return first > 0 && first >= blocks[i / parts].keys ? 0 : static_cast<int>(begin[1] - begin[0]);
  }
  __device__ Unit whole(int head, int i) const {
    DeviceBlock block = blocks[i / parts];
    const int first = first_key(i);
    block.key_begin += first;
    block.first_token += first;
    block.keys = min(part_keys, block.keys - first);
    Unit unit = unit_of(head, list(head, i), rows(head, i), block);
    unit.part = i % parts;
    return unit;
  }
};

HeadTotal total_of(const Shape& shape, Slab slab, const Pass& pass) {
  const std::int64_t parts = pass.parts;
  return {parts * shape.max_blocks, parts * slab.tokens * shape.group * shape.slots};
}
}  // namespace
}  // namespace cutting

using namespace cutting;

std::int64_t unit_capacity(const Shape& shape, Slab slab, int rows_per_unit) {
  return most_units(static_cast<std::int64_t>(slab.heads) * shape.max_blocks,
                    static_cast<std::int64_t>(slab.heads) * slab.tokens * shape.group * shape.slots, rows_per_unit);
}

std::int64_t backward_unit_capacity(const Shape& shape, Slab slab, const Pass& pass) {
  return backward_units(slab, pass.sections, total_of(shape, slab, pass));
}

ShareCapacity share_capacity(const Shape& shape, Slab slab, const Pass& pass) {
  return backward_shares(slab, pass.sections, total_of(shape, slab, pass));
}

void list_units(const Shape& shape, Slab slab, Batch batch, const Index& index, int rows_per_unit, const UnitList& list,
                cudaStream_t stream) {
  const Sections sections{1, rows_per_unit, rows_per_unit};
  const ListsOfHeads heads{slab.head_begin,  slab.heads,
                           shape.max_blocks, shape.group,
                           shape.causal,     unit_capacity(shape, slab, rows_per_unit),
                           sections,         last_section(slab.heads, sections)};
  launch_cut(Start::early, ChosenLists{heads, batch.blocks, index.offsets, index.rows}, shape.sm_count, index.rows,
             list, {}, stream);
}

void list_backward_units(Start start, const Shape& shape, Slab slab, Batch batch, const Index& index, const Pass& pass,
                         const UnitList& list, const ShareList& shares, cudaStream_t stream) {
  const ListsOfHeads heads =
      backward_heads(shape, slab, pass, total_of(shape, slab, pass), shape.max_blocks * pass.parts);
  const ChosenLists chosen{heads, batch.blocks, index.offsets, index.rows};
  launch_cut(start, PartLists{chosen, shape.max_blocks, pass.part_keys, pass.part_begin, pass.parts}, shape.sm_count,
             index.rows, list, shares, stream);
}

}  // namespace moba::cuda
