// The ids of one row of a slab, read and checked by one thread.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"

namespace moba::cuda {

// What index works on.
struct Sizes {
  Divide by_group;
  int token_begin, group, slots;
  int rows, tiles;  // of a key head
  int max_blocks, segments;
  int batch;
};

// One row of ids as a tile's thread reads it, some ids at a time. The first of them should be loaded before the row is
// located: then one wait for memory covers both.
class RowIds {
 public:
  RowIds() = default;
  __device__ RowIds(const Sizes& sizes, const IdsView<const std::int32_t>& ids, int head, int row)
      : slots_(sizes.slots), exists_(row < sizes.rows) {
    if (!exists_) return;
    token_ = sizes.by_group(row);
    ids_ =
        ids.data + head * ids.head_stride + token_ * ids.token_stride + (row - token_ * sizes.group) * ids.group_stride;
    vectors_ = reinterpret_cast<std::uintptr_t>(ids_) % sizeof(int4) == 0;
  }

  // Finds the sequence, whose first block is added to the ids. check() and to_blocks() need it.
  __device__ void locate(const Sizes& sizes, const Batch& batch) {
    const int sequence = exists_ ? find_sequence(batch, sizes.batch, sizes.token_begin + token_) : -1;
    if (sequence < 0) return;
    block_begin_ = batch.sequences[sequence].block_begin;
    blocks_ = batch.sequences[sequence].blocks;
    in_sequence_ = true;
  }

  __device__ bool exists() const { return exists_; }

  // Ids first .. first + n - 1 as they stand; -1 behind the last slot.
  template <int n>
  __device__ void load(int first, int (&id)[n]) const {
    if (vectors_ && first + n <= slots_) {
#pragma unroll
      for (int j = 0; j < n; j += 4) {
        const int4 four = __ldg(reinterpret_cast<const int4*>(ids_ + first + j));
        id[j] = four.x, id[j + 1] = four.y, id[j + 2] = four.z, id[j + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < n; ++j) id[j] = exists_ && first + j < slots_ ? __ldg(ids_ + first + j) : -1;
  }

  // Number of ids; -1 if the row breaks the rules: strictly ascending, in range, then -1. `loaded` holds the first n.
  // Without a sign -1 is above all ids: then none that follows it may be an id, as none may that is not above its own.
  template <int n>
  __device__ int check(const int (&loaded)[n]) const {
    bool breaks = !in_sequence_ || out_of_range(loaded[0]);
    int count = loaded[0] != -1 ? 1 : 0;
    const auto look = [&](int before, int id) {
      breaks |= (id != -1 && static_cast<unsigned>(id) <= static_cast<unsigned>(before)) || out_of_range(id);
      count += id != -1 ? 1 : 0;
    };
#pragma unroll
    for (int j = 1; j < n; ++j) look(loaded[j - 1], loaded[j]);
    for (int j = n, before = loaded[n - 1]; j < slots_; ++j) {
      const int id = __ldg(ids_ + j);
      look(before, id);
      before = id;
    }
    return breaks ? -1 : count;
  }

  // The ids of a valid row as blocks of the batch; -1 for none.
  template <int n>
  __device__ void to_blocks(bool valid, int (&id)[n]) const {
#pragma unroll
    for (int& i : id) i = valid && i >= 0 ? i + block_begin_ : -1;
  }

 private:
  // Neither -1 nor the number of a block.
  __device__ bool out_of_range(int id) const { return static_cast<unsigned>(id) + 1 > static_cast<unsigned>(blocks_); }

  const std::int32_t* ids_ = nullptr;
  int slots_ = 0, token_ = 0, block_begin_ = 0, blocks_ = 0;
  bool exists_ = false, in_sequence_ = false, vectors_ = false;
};

// Calls f(ids, first slot of them), n ids at a time, the first n of them `loaded` already.
template <int n, class F>
__device__ __forceinline__ void for_each_chunk(const RowIds& row, bool valid, int slots, const int (&loaded)[n],
                                               F&& f) {
  f(loaded, 0);
  for (int first = n; first < slots; first += n) {
    int id[n];
    row.load(first, id);
    row.to_blocks(valid, id);
    f(id, first);
  }
}

}  // namespace moba::cuda
