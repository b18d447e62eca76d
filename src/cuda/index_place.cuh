// place_rows: the last launch of index, and what the earlier ones leave for it.
#pragma once

#include <algorithm>

#include "cuda/contract.h"
#include "cuda/lanes.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/row_ids.cuh"
#include "cuda/scan.cuh"

namespace moba::cuda {

inline constexpr int kTile = 1024;     // rows
inline constexpr int kBlockBits = 10;  // a window of place_rows has up to 1024 blocks
inline constexpr int kSegment = 512;

// What the launches leave for each other, in the scratch memory.
struct IndexScratch {
  std::int32_t* before;   // [heads][tiles][max_blocks]
  std::uint16_t* counts;  // [heads][tiles][max_blocks]
  std::int32_t* sums;     // [heads][max_blocks]
  std::uint8_t* marks;    // [heads][segments][tiles]: whether the tile has ids in the segment
  int* finished;          // CTAs of scan_tiles
};

// Shared memory of place_rows, for windows of `window` blocks.
struct PlaceMemory {
  std::uint32_t* bits;    // [32][window]: those of 32 rows that chose the block; then the tile's rows in list order
  std::uint16_t* before;  // [32][window]: place in the tile of the first of those rows
  int* shift;             // [window]: from the place of a row in the tile to its position
  std::uint8_t* marked;   // [segments]

  __device__ PlaceMemory(char* memory, int window, int staged)
      : bits(reinterpret_cast<std::uint32_t*>(memory)),
        before(reinterpret_cast<std::uint16_t*>(bits + max(32 * window, staged))),
        shift(reinterpret_cast<int*>(before + 32 * window)),
        marked(reinterpret_cast<std::uint8_t*>(shift + window)) {}
  static std::size_t bytes(int window, int staged, int segments) {
    return sizeof(std::uint32_t) * static_cast<std::size_t>(std::max(32 * window, staged)) +
           (32 * sizeof(std::uint16_t) + sizeof(int)) * static_cast<std::size_t>(window) +
           static_cast<std::size_t>(segments);
  }
};

// Sets bit `lane` for the block of each lane with one, window begin .. end. Where all lanes name the same block (the
// own block, a sink) one store does it: atomics on one word would go one by one.
__device__ __forceinline__ void mark_rows(std::uint32_t* bits_of_warp, int block, int begin, int end, int lane) {
  const int of_first = __shfl_sync(kAllLanes, block, 0);
  const bool inside = block >= begin && block < end;
  if (__all_sync(kAllLanes, block == of_first)) {
    if (inside && lane == 0) bits_of_warp[block - begin] = ~0u;
  } else if (inside) {
    atomicOr(&bits_of_warp[block - begin], 1u << lane);
  }
}

// Calls f(j) for the slots j < kIds, four at a time.
template <int kIds, class F>
__device__ __forceinline__ void for_each_slot(int slots, const F& f) {
#pragma unroll
  for (int first = 0; first < kIds; first += 4) {
    if (first >= slots) continue;
#pragma unroll
    for (int j = first; j < first + 4; ++j) f(j);
  }
}

// Grid: (tiles, heads). The tile's entries are numbered by list; the place of a row in its list is the first of its 32
// rows' plus the bits of lower lanes. kStaged: all ids of a row, up to kIds, stay in registers, and the rows go through
// shared memory in list order, so that the stores of a list are contiguous. Else the ids are read kIds at a time, and
// rows are stored from where they are. Two CTAs of 512 threads share an SM: one computes while the other waits.
template <int kIds, int kThreads, bool kStaged>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    place_rows(Sizes sizes, int window, Batch batch, IdsView<const std::int32_t> ids, Index index,
               IndexScratch scratch) {
  ptx::start_behind_previous();
  constexpr int kRows = kTile / kThreads, kWarps = kThreads / 32;
  constexpr int kPlaced = 1 << 30;  // with it an id is replaced by its place << kBlockBits | block in the window
  extern __shared__ int4 memory[];
  __shared__ int scan_scratch[kScanScratch];
  const PlaceMemory shared(reinterpret_cast<char*>(memory), window, kStaged ? kTile * sizes.slots : 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int head = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x), n = sizes.max_blocks;
  const std::int64_t first_list = static_cast<std::int64_t>(head) * n;
  const std::int64_t tile_lists = (static_cast<std::int64_t>(head) * sizes.tiles + tile) * n;

  // Blocks still to place; then -3 - position, -1 for none.
  RowIds row_ids[kRows];
  int loaded[kRows][kIds];
  bool valid[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row_ids[r] = RowIds(sizes, ids, head, tile * kTile + r * kThreads + thread);
    row_ids[r].load(0, loaded[r]);
  }
#pragma unroll 1  // mostly one
  for (int s = thread; s < sizes.segments; s += kThreads) {
    shared.marked[s] = scratch.marks[(static_cast<std::int64_t>(head) * sizes.segments + s) * sizes.tiles + tile];
  }
  const std::int64_t head_entry = index.offsets[first_list];
  std::int32_t* rows = index.rows + head_entry;
  const int first_row_id = sizes.token_begin * sizes.group + tile * kTile;
  std::int32_t* positions =
      index.positions == nullptr
          ? nullptr
          : index.positions +
                (static_cast<std::int64_t>(head) * sizes.rows + static_cast<std::int64_t>(tile) * kTile) * sizes.slots;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row_ids[r].locate(sizes, batch);
    valid[r] = row_ids[r].exists() && row_ids[r].check(loaded[r]) >= 0;
    row_ids[r].to_blocks(valid[r], loaded[r]);
    if constexpr (!kStaged) {
      if (positions == nullptr || !row_ids[r].exists()) continue;
      for (int j = 0; j < sizes.slots; ++j) {
        positions[static_cast<std::int64_t>(r * kThreads + thread) * sizes.slots + j] = valid[r] ? -1 : kInvalidRow;
      }
    }
  }
  __syncthreads();

  for (int begin = 0; begin < n; begin += window) {
    const int end = min(n, begin + window);
    bool any = false;
    for (int s = begin / kSegment; s * kSegment < end; ++s) any = any || shared.marked[s] != 0;
    if (!any) continue;
    const bool has_block = thread < end - begin && shared.marked[(begin + thread) / kSegment] != 0;
    int in_tile = 0, first = 0;
    if (has_block) {
      const int block = begin + thread;
      in_tile = scratch.counts[tile_lists + block];
      first = static_cast<int>(index.offsets[first_list + block] - head_entry) + scratch.before[tile_lists + block];
    }
    for (int i = thread; i < 8 * window; i += kThreads) {
      reinterpret_cast<int4*>(shared.bits)[i] = make_int4(0, 0, 0, 0);
    }
    int all;
    const int local = scan_block<kWarps>(in_tile, scan_scratch, &all);  // has barriers: the bits are cleared
    if (thread < window) shared.shift[thread] = first - local;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto mark = [&](const int(&id)[kIds], int first_slot) {
        for_each_slot<kIds>(sizes.slots - first_slot, [&](int j) {
          mark_rows(shared.bits + (r * kWarps + warp) * window, id[j], begin, end, lane);
        });
      };
      if constexpr (kStaged) {
        mark(loaded[r], 0);
      } else {
        for_each_chunk(row_ids[r], valid[r], sizes.slots, loaded[r], mark);
      }
    }
    __syncthreads();
    if (has_block) {
      int place = local;
#pragma unroll 8
      for (int group = 0; group < 32; ++group) {
        shared.before[group * window + thread] = static_cast<std::uint16_t>(place);
        place += __popc(shared.bits[group * window + thread]);
      }
    }
    __syncthreads();

    const auto place_of = [&](int r, int block) {
      const int at = (r * kWarps + warp) * window + block;
      return shared.before[at] + __popc(shared.bits[at] & ptx::lane_mask_below());
    };
    if constexpr (kStaged) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        for_each_slot<kIds>(sizes.slots, [&](int j) {
          int& id = loaded[r][j];
          if (id >= begin && id < end) id = kPlaced | place_of(r, id - begin) << kBlockBits | (id - begin);
        });
      }
      __syncthreads();  // the bits are done with
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        for_each_slot<kIds>(sizes.slots, [&](int j) {
          int& id = loaded[r][j];
          if (id < kPlaced) return;
          const int block = id & ((1 << kBlockBits) - 1), place = (id & (kPlaced - 1)) >> kBlockBits;
          shared.bits[place] = static_cast<std::uint32_t>(block * kTile + r * kThreads + thread);
          id = -3 - (place + shared.shift[block]);
        });
      }
      __syncthreads();
#pragma unroll 4
      for (int i = thread; i < all; i += kThreads) {
        const std::uint32_t entry = shared.bits[i];
        rows[shared.shift[entry / kTile] + i] = first_row_id + static_cast<int>(entry % kTile);
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = r * kThreads + thread;
        for_each_chunk(row_ids[r], valid[r], sizes.slots, loaded[r], [&](const int(&id)[kIds], int first_slot) {
#pragma unroll
          for (int j = 0; j < kIds; ++j) {
            if (id[j] < begin || id[j] >= end) continue;
            const int position = shared.shift[id[j] - begin] + place_of(r, id[j] - begin);
            rows[position] = first_row_id + row;
            if (positions != nullptr)
              positions[static_cast<std::int64_t>(row) * sizes.slots + first_slot + j] = position;
          }
        });
      }
    }
    __syncthreads();
  }

  if (!kStaged || positions == nullptr) return;
  const bool vectors = sizes.slots % 4 == 0 && reinterpret_cast<std::uintptr_t>(positions) % sizeof(int4) == 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!row_ids[r].exists()) continue;
    std::int32_t* to = positions + (r * kThreads + thread) * sizes.slots;
#pragma unroll
    for (int j = 0; j < kIds; ++j) {
      loaded[r][j] = !valid[r] ? kInvalidRow : loaded[r][j] == -1 ? -1 : -3 - loaded[r][j];
    }
#pragma unroll
    for (int j = 0; j < kIds; j += 4) {
      if (vectors && j < sizes.slots) {
        *reinterpret_cast<int4*>(to + j) =
            make_int4(loaded[r][j], loaded[r][j + 1], loaded[r][j + 2], loaded[r][j + 3]);
        continue;
      }
#pragma unroll
      for (int i = j; i < j + 4; ++i) {
        if (i < sizes.slots) to[i] = loaded[r][i];
      }
    }
  }
}

}  // namespace moba::cuda
