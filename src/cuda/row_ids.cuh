// The ids of one row of a slab, read and checked by one thread.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/contract.h"

namespace moba::cuda {

// What index works on.
struct Sizes {
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
    token_ = row / sizes.group;
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
  template <int n>
  __device__ int check(const int (&loaded)[n]) const {
    int count = 0, previous = -1;
    bool valid = in_sequence_, ended = false;
    const auto look = [&](int id) {
      const bool is_id = id >= 0;
      valid = valid && (is_id ? !ended && id > previous && id < blocks_ : id == -1);
      ended = ended || !is_id;
      previous = id;
      count += is_id ? 1 : 0;
    };
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j < slots_) look(loaded[j]);
    }
    for (int j = n; j < slots_; ++j) look(__ldg(ids_ + j));
    return valid ? count : -1;
  }

  // The ids of a valid row as blocks of the batch; -1 for none.
  template <int n>
  __device__ void to_blocks(bool valid, int (&id)[n]) const {
#pragma unroll
    for (int& i : id) i = valid && i >= 0 ? i + block_begin_ : -1;
  }

 private:
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
