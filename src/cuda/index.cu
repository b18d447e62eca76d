// index: the transpose of a selection by counting, in four launches that leave no host a count to read.
//
//   count_ids     tile of 1024 slab rows: how many of its rows chose each block      tiles [heads][tiles][blocks]
//   scan_tiles    per block: rows of earlier tiles in place of the counts, and sums  sums [heads][blocks]
//   scan_blocks   per head: offsets
//   place_rows    tile: rank of each row in its lists, rows and positions
//
// The blocks are cut into segments of 512. A tile marks the segments it has ids in, and only those are written and
// read: with short sequences or local choices a tile touches few of many blocks.
#include <algorithm>

#include "cuda/contract.h"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/row_ids.cuh"
#include "cuda/scan.cuh"

namespace moba::cuda {

namespace {

constexpr int kTile = 1024;     // rows, and threads of a CTA
constexpr int kBlockBits = 10;  // a window of place_rows has up to 1024 blocks
constexpr int kSegment = 512;
constexpr int kSegmentsAtOnce = 16;  // counted in 32 KB of shared memory
constexpr int kMaxSegments = 4096;   // whose marks fit in shared memory: 2 M blocks

// What count_ids leaves for place_rows, in the scratch memory.
struct Scratch {
  std::int32_t* tiles;  // [heads][tiles][max_blocks]
  std::int32_t* sums;   // [heads][max_blocks]
  std::uint8_t* marks;  // [heads][segments][tiles]: whether the tile has ids in the segment
};

// Grid: (tiles, heads). Shared memory: counts of kSegmentsAtOnce segments (or of all, if fewer), marks of all.
__global__ void __launch_bounds__(kTile)
    count_ids(Sizes sizes, Batch batch, IdsView<const std::int32_t> ids, CountsView counts, Scratch scratch) {
  constexpr int kChunk = 8;
  extern __shared__ int count_of[];
  const int at_once = min(sizes.segments, kSegmentsAtOnce), thread = static_cast<int>(threadIdx.x);
  std::uint8_t* marked = reinterpret_cast<std::uint8_t*>(count_of + at_once * kSegment);
  const int head = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x), row = tile * kTile + thread;
  for (int s = thread; s < sizes.segments; s += kTile) marked[s] = 0;

  const RowIds row_ids(sizes, batch, ids, head, row);
  int loaded[kChunk];
  row_ids.load(0, loaded);
  const int found = row_ids.exists() ? row_ids.check(loaded) : -1;
  if (row_ids.exists() && counts.data != nullptr) {
    const int token = row / sizes.group;
    counts.data[head * counts.head_stride + token * counts.token_stride +
                (row - token * sizes.group) * counts.group_stride] = max(found, 0);
  }
  row_ids.to_blocks(found >= 0, loaded);
  __syncthreads();
  for_each_chunk(row_ids, found >= 0, sizes.slots, loaded, [&](const int(&id)[kChunk], int) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (id[j] >= 0) marked[id[j] / kSegment] = 1;
    }
  });
  __syncthreads();
  for (int s = thread; s < sizes.segments; s += kTile) {
    scratch.marks[(static_cast<std::int64_t>(head) * sizes.segments + s) * sizes.tiles + tile] = marked[s];
  }

  std::int32_t* to = scratch.tiles + (static_cast<std::int64_t>(head) * sizes.tiles + tile) * sizes.max_blocks;
  for (int first = 0; first < sizes.segments; first += at_once) {
    const bool mine = thread < at_once && first + thread < sizes.segments && marked[first + thread] != 0;
    if (__syncthreads_or(mine) == 0) continue;
    const int begin = first * kSegment, end = min(sizes.max_blocks, (first + at_once) * kSegment);
    for (int b = thread; b < end - begin; b += kTile) count_of[b] = 0;
    __syncthreads();
    for_each_chunk(row_ids, found >= 0, sizes.slots, loaded, [&](const int(&id)[kChunk], int) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (id[j] >= begin && id[j] < end) atomicAdd(&count_of[id[j] - begin], 1);
      }
    });
    __syncthreads();
    for (int b = thread; b < end - begin; b += kTile) {
      if (marked[first + b / kSegment] != 0) to[begin + b] = count_of[b];
    }
  }
}

// 32 blocks by 32 runs of tiles; grid: (blocks / 32, heads).
__global__ void __launch_bounds__(1024) scan_tiles(Sizes sizes, Scratch scratch) {
  constexpr int kAtOnce = 8;
  __shared__ int run_sum[32][33];
  const int lane = static_cast<int>(threadIdx.x) % 32, run = static_cast<int>(threadIdx.x) / 32;
  const int first_block = static_cast<int>(blockIdx.x) * 32, block = first_block + lane;
  const int head = static_cast<int>(blockIdx.y), n = sizes.max_blocks;
  const int per_run = (sizes.tiles + 31) / 32, begin = min(sizes.tiles, run * per_run),
            end = min(sizes.tiles, begin + per_run);
  const std::uint8_t* marks =
      scratch.marks + (static_cast<std::int64_t>(head) * sizes.segments + first_block / kSegment) * sizes.tiles;
  std::int32_t* column = scratch.tiles + static_cast<std::int64_t>(head) * sizes.tiles * n + block;
  // Counts of kAtOnce tiles, all loads in flight; 0 where the tile has nothing in the segment.
  const auto load = [&](int first, bool(&there)[kAtOnce], int(&count)[kAtOnce]) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) there[i] = block < n && first + i < end && marks[first + i] != 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) count[i] = there[i] ? column[static_cast<std::int64_t>(first + i) * n] : 0;
  };
  bool there[kAtOnce];
  int count[kAtOnce], sum = 0;
  for (int first = begin; first < end; first += kAtOnce) {
    load(first, there, count);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += count[i];
  }
  run_sum[run][lane] = sum;
  __syncthreads();
  int total;
  const int before = scan_warp(run_sum[lane][run], &total);  // warp `run` scans the runs of block `run`
  run_sum[lane][run] = before;
  if (lane == 0 && first_block + run < n) scratch.sums[static_cast<std::int64_t>(head) * n + first_block + run] = total;
  __syncthreads();
  sum = run_sum[run][lane];
  for (int first = begin; first < end; first += kAtOnce) {
    load(first, there, count);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (there[i]) column[static_cast<std::int64_t>(first + i) * n] = sum;
      sum += count[i];
    }
  }
}

__device__ std::int64_t sum_block(std::int64_t value, std::int64_t* scratch) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[threadIdx.x % 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// A CTA a head: the sum of the heads before it, then the scan of its own blocks.
__global__ void __launch_bounds__(1024)
    scan_blocks(Sizes sizes, Scratch scratch, const std::int64_t* offsets_begin, std::int64_t* offsets) {
  constexpr int kEach = 4;  // blocks of a thread at a time
  __shared__ std::int64_t sums_of_warps[32];
  __shared__ int scan_scratch[kScanScratch];
  const int head = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x), n = sizes.max_blocks;
  std::int64_t before = 0;
  for (std::int64_t i = thread; i < static_cast<std::int64_t>(head) * n; i += 1024) before += scratch.sums[i];
  std::int64_t base = sum_block(before, sums_of_warps) + (offsets_begin != nullptr ? *offsets_begin : 0);
  const std::int32_t* sums = scratch.sums + static_cast<std::int64_t>(head) * n;
  std::int64_t* to = offsets + static_cast<std::int64_t>(head) * n;
  for (int first = 0; first < n; first += 1024 * kEach) {
    const int block = first + thread * kEach;
    int sum[kEach], all = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) all += sum[i] = block + i < n ? sums[block + i] : 0;
    int total;
    std::int64_t offset = base + scan_block(all, scan_scratch, &total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (block + i < n) to[block + i] = offset;
      offset += sum[i];
    }
    base += total;
  }
  if (head == static_cast<int>(gridDim.x) - 1 && thread == 0) to[n] = base;
}

// Keeps rows of 8 or 16 words off the same banks.
__host__ __device__ constexpr int padded(int word) { return word + word / 32; }

// Shared memory of place_rows, for windows of `window` blocks.
struct PlaceMemory {
  std::uint32_t* bits;    // [32 warps][window]: the rows of the warp that chose the block; then the rows in list order
  std::uint16_t* before;  // [16][window]: rows of the warps before each second warp
  int* first;             // [window]: position of the block's first row of this tile
  int* local;             // [window]: the same among the tile's rows
  std::uint8_t* marked;   // [segments]

  __device__ PlaceMemory(char* memory, int window, int staged)
      : bits(reinterpret_cast<std::uint32_t*>(memory)),
        before(reinterpret_cast<std::uint16_t*>(bits + max(32 * window, staged))),
        first(reinterpret_cast<int*>(before + 16 * window)),
        local(first + window),
        marked(reinterpret_cast<std::uint8_t*>(local + window)) {}
  static std::size_t bytes(int window, int staged, int segments) {
    return sizeof(std::uint32_t) * static_cast<std::size_t>(std::max(32 * window, staged)) +
           (16 * sizeof(std::uint16_t) + 2 * sizeof(int)) * static_cast<std::size_t>(window) +
           static_cast<std::size_t>(segments);
  }
};

// Sets bit `lane` for the block of each lane with one, window begin .. end. Where all lanes name the same block (the
// own block, a sink) one store does it: atomics on one word would go one by one.
__device__ __forceinline__ void mark_rows(std::uint32_t* bits_of_warp, int block, int begin, int end, int lane) {
  const int of_first = __shfl_sync(~0u, block, 0);
  const bool inside = block >= begin && block < end;
  if (__all_sync(~0u, block == of_first)) {
    if (inside && lane == 0) bits_of_warp[block - begin] = ~0u;
  } else if (inside) {
    atomicOr(&bits_of_warp[block - begin], 1u << lane);
  }
}

// Grid: (tiles, heads). The rank of a row in a list of its tile is the number of bits before it: a prefix over pairs of
// warps, the bits of the even warp, those of lower lanes. kIds ids of a row stay in registers. Up to that many slots
// the rows go through shared memory in list order, so that the stores of a list are contiguous (a prototype on an H200
// took 6.3 us a head instead of 9.4 at 64 K rows, 512 blocks, 8 slots); with more slots they are stored from where they
// are.
template <int kIds>
__global__ void __launch_bounds__(kTile, 1)
    place_rows(Sizes sizes, int window, Batch batch, IdsView<const std::int32_t> ids, Index index, Scratch scratch) {
  extern __shared__ int4 memory[];
  __shared__ int scan_scratch[kScanScratch];
  const bool staged = sizes.slots <= kIds;
  const PlaceMemory shared(reinterpret_cast<char*>(memory), window, staged ? padded(kTile * sizes.slots) : 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int head = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x), row = tile * kTile + thread;
  const int row_id = sizes.token_begin * sizes.group + row, n = sizes.max_blocks;
  const std::int64_t first_list = static_cast<std::int64_t>(head) * n;
  const std::int64_t head_entry = index.offsets[first_list];
  const std::int32_t* tile_first = scratch.tiles + (static_cast<std::int64_t>(head) * sizes.tiles + tile) * n;
  std::int32_t* rows = index.rows + head_entry;
  std::int32_t* positions =
      index.positions == nullptr
          ? nullptr
          : index.positions +
                (static_cast<std::int64_t>(head) * sizes.rows + static_cast<std::int64_t>(tile) * kTile) * sizes.slots;
  for (int s = thread; s < sizes.segments; s += kTile) {
    shared.marked[s] = scratch.marks[(static_cast<std::int64_t>(head) * sizes.segments + s) * sizes.tiles + tile];
  }

  const RowIds row_ids(sizes, batch, ids, head, row);
  // Blocks still to place; then -3 - position, -1 for none, kInvalidRow.
  int loaded[kIds];
  row_ids.load(0, loaded);
  const bool valid = row_ids.exists() && row_ids.check(loaded) >= 0;
  row_ids.to_blocks(valid, loaded);
  const auto position_code = [](int position) { return -3 - position; };
  if (!staged && positions != nullptr && row_ids.exists()) {
    for (int j = 0; j < sizes.slots; ++j) {
      positions[static_cast<std::int64_t>(thread) * sizes.slots + j] = valid ? -1 : kInvalidRow;
    }
  }
  __syncthreads();

  for (int begin = 0; begin < n; begin += window) {
    const int end = min(n, begin + window);
    bool any = false;
    for (int s = begin / kSegment; s * kSegment < end; ++s) any = any || shared.marked[s] != 0;
    if (!any) continue;
    for (int i = thread; i < 8 * window; i += kTile) reinterpret_cast<int4*>(shared.bits)[i] = make_int4(0, 0, 0, 0);
    __syncthreads();
    for_each_chunk(row_ids, valid, sizes.slots, loaded, [&](const int(&id)[kIds], int) {
#pragma unroll
      for (int j = 0; j < kIds; ++j) mark_rows(shared.bits + warp * window, id[j], begin, end, lane);
    });
    __syncthreads();
    int in_tile = 0;
    if (thread < end - begin && shared.marked[(begin + thread) / kSegment] != 0) {
#pragma unroll 4
      for (int pair = 0; pair < 16; ++pair) {
        shared.before[pair * window + thread] = static_cast<std::uint16_t>(in_tile);
        in_tile +=
            __popc(shared.bits[2 * pair * window + thread]) + __popc(shared.bits[(2 * pair + 1) * window + thread]);
      }
      shared.first[thread] =
          static_cast<int>(index.offsets[first_list + begin + thread] - head_entry) + tile_first[begin + thread];
    }
    int all;
    const int local = scan_block(in_tile, scan_scratch, &all);
    if (thread < window) shared.local[thread] = local;
    __syncthreads();

    const auto rank_of = [&](int b) {
      int rank = shared.before[warp / 2 * window + b] + __popc(shared.bits[warp * window + b] & ptx::lane_mask_below());
      if (warp % 2 != 0) rank += __popc(shared.bits[(warp - 1) * window + b]);
      return rank;
    };
    if (staged) {
      int place[kIds];  // block in the window and place in the tile
#pragma unroll
      for (int j = 0; j < kIds; ++j) {
        place[j] = -1;
        if (loaded[j] >= begin && loaded[j] < end) {
          const int b = loaded[j] - begin, rank = rank_of(b);
          place[j] = (shared.local[b] + rank) << kBlockBits | b;
          loaded[j] = position_code(shared.first[b] + rank);
        }
      }
      __syncthreads();  // the bits are done with
#pragma unroll
      for (int j = 0; j < kIds; ++j) {
        if (place[j] < 0) continue;
        const int b = place[j] & ((1 << kBlockBits) - 1);
        shared.bits[place[j] >> kBlockBits] = static_cast<std::uint32_t>(b * kTile + thread);
      }
      __syncthreads();
      const int tile_row = row_id - thread;
      for (int i = thread; i < all; i += kTile) {
        const int entry = static_cast<int>(shared.bits[i]), b = entry / kTile;
        rows[shared.first[b] - shared.local[b] + i] = tile_row + entry % kTile;
      }
    } else {
      for_each_chunk(row_ids, valid, sizes.slots, loaded, [&](const int(&id)[kIds], int first) {
#pragma unroll
        for (int j = 0; j < kIds; ++j) {
          if (id[j] < begin || id[j] >= end) continue;
          const int position = shared.first[id[j] - begin] + rank_of(id[j] - begin);
          rows[position] = row_id;
          if (positions != nullptr) positions[static_cast<std::int64_t>(thread) * sizes.slots + first + j] = position;
        }
      });
    }
    __syncthreads();
  }

  if (!staged || positions == nullptr) return;
  std::int32_t* stage = reinterpret_cast<std::int32_t*>(shared.bits);
#pragma unroll
  for (int j = 0; j < kIds; ++j) {
    if (j >= sizes.slots) continue;
    stage[padded(thread * sizes.slots + j)] = !valid ? kInvalidRow : loaded[j] == -1 ? -1 : position_code(loaded[j]);
  }
  __syncthreads();
  for (int i = thread; i < min(kTile, sizes.rows - tile * kTile) * sizes.slots; i += kTile)
    positions[i] = stage[padded(i)];
}

Sizes sizes_of(const Shape& shape, const Slab& slab) {
  const int rows = slab.tokens * shape.group;
  const int segments = (shape.max_blocks + kSegment - 1) / kSegment;
  if (segments > kMaxSegments)
    throw Error("block_size: gives more than 2097152 blocks, the most that index on CUDA takes");
  return {slab.token_begin,           shape.group,      shape.slots, rows,
          (rows + kTile - 1) / kTile, shape.max_blocks, segments,    shape.batch};
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

struct ScratchBytes {
  std::size_t tiles, sums, marks;
};

ScratchBytes scratch_bytes(const Sizes& s, int heads) {
  const std::size_t lists = static_cast<std::size_t>(heads) * static_cast<std::size_t>(s.max_blocks);
  const std::size_t tiles = static_cast<std::size_t>(s.tiles);
  return {aligned(sizeof(std::int32_t) * lists * tiles), aligned(sizeof(std::int32_t) * lists),
          aligned(static_cast<std::size_t>(heads) * static_cast<std::size_t>(s.segments) * tiles)};
}

// Blocks that place_rows handles at a time. Above 1024 blocks 1024 (a prototype took 112 us instead of 153 with
// 512 at 4096 blocks on an H200), where the device has the shared memory: parts with 99 KB have not.
int window_of(const Sizes& sizes, int staged) {
  if (sizes.max_blocks <= kSegment) return std::max(32, (sizes.max_blocks + 31) / 32 * 32);
  if (sizes.max_blocks <= 1024) return kSegment;
  int device = 0, most = 0;
  MOBA_CUDA(cudaGetDevice(&device));
  MOBA_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const std::size_t reserve = 1024;  // what the kernel holds besides
  return PlaceMemory::bytes(1024, staged, sizes.segments) + reserve <= static_cast<std::size_t>(most) ? 1024 : kSegment;
}

template <int kIds>
void launch_place_rows(const Sizes& sizes, int heads, const Batch& batch, const IdsView<const std::int32_t>& ids,
                       const Index& index, const Scratch& scratch, cudaStream_t stream) {
  const int staged = sizes.slots <= kIds ? padded(kTile * sizes.slots) : 0, window = window_of(sizes, staged);
  launch(place_rows<kIds>, dim3(sizes.tiles, heads), kTile, PlaceMemory::bytes(window, staged, sizes.segments), stream,
         sizes, window, batch, ids, index, scratch);
}

}  // namespace

std::size_t index_scratch_bytes(const Shape& shape, Slab slab) {
  const ScratchBytes bytes = scratch_bytes(sizes_of(shape, slab), slab.heads);
  return bytes.tiles + bytes.sums + bytes.marks;
}

void index(const Shape& shape, Slab slab, Batch batch, IdsView<const std::int32_t> ids, CountsView counts,
           const Index& index, const std::int64_t* offsets_begin, void* scratch, cudaStream_t stream) {
  const Sizes sizes = sizes_of(shape, slab);
  const ScratchBytes bytes = scratch_bytes(sizes, slab.heads);
  char* memory = static_cast<char*>(scratch);
  const Scratch parts{reinterpret_cast<std::int32_t*>(memory), reinterpret_cast<std::int32_t*>(memory + bytes.tiles),
                      reinterpret_cast<std::uint8_t*>(memory + bytes.tiles + bytes.sums)};
  const std::size_t count_bytes =
      sizeof(int) * kSegment * static_cast<std::size_t>(std::min(sizes.segments, kSegmentsAtOnce)) +
      static_cast<std::size_t>(sizes.segments);
  launch(count_ids, dim3(sizes.tiles, slab.heads), kTile, count_bytes, stream, sizes, batch, ids, counts, parts);
  launch(scan_tiles, dim3((sizes.max_blocks + 31) / 32, slab.heads), 1024, 0, stream, sizes, parts);
  launch(scan_blocks, dim3(slab.heads), 1024, 0, stream, sizes, parts, offsets_begin, index.offsets);
  if (sizes.slots <= 8) {
    launch_place_rows<8>(sizes, slab.heads, batch, ids, index, parts, stream);
  } else {
    launch_place_rows<16>(sizes, slab.heads, batch, ids, index, parts, stream);
  }
}

}  // namespace moba::cuda
