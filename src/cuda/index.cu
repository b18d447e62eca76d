// index: the transpose of a selection by counting, in three launches that leave no host a count to read.
//
//   count_ids     tile of 1024 slab rows: how many of its rows chose each block     counts [heads][tiles][blocks]
//   scan_tiles    per block: rows of earlier tiles, and their sum                   before [heads][tiles][blocks]
//                 the CTA that comes last: offsets                                  sums   [heads][blocks]
//   place_rows    tile: rank of each row in its lists, rows and positions
//
// The blocks are cut into segments of 512. A tile marks the segments it has ids in, and only those are written and
// read: with short sequences or local choices a tile touches few of many blocks.
#include <algorithm>

#include "call.h"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/index_place.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/row_ids.cuh"
#include "cuda/scan.cuh"

namespace moba::cuda {

namespace {

constexpr int kSegmentsAtOnce = 16;  // counted in 32 KB of shared memory
static_assert(kMaxBlocks / kSegment <= 4096, "marks of all segments stand in shared memory");
constexpr int kCountThreads = 512;

// Grid: (tiles, heads). Shared memory: counts of kSegmentsAtOnce segments (or of all, if fewer), marks of all.
__global__ void __launch_bounds__(kCountThreads, 2)
    count_ids(Sizes sizes, Batch batch, IdsView<const std::int32_t> ids, CountsView counts, IndexScratch scratch) {
  ptx::start_behind_previous();
  constexpr int kChunk = 8, kRows = kTile / kCountThreads;
  extern __shared__ int count_of[];
  const int at_once = min(sizes.segments, kSegmentsAtOnce), thread = static_cast<int>(threadIdx.x);
  const bool one_pass = sizes.segments <= kSegmentsAtOnce;
  std::uint8_t* marked = reinterpret_cast<std::uint8_t*>(count_of + at_once * kSegment);
  const int head = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x);
  if (head == 0 && tile == 0 && thread == 0) *scratch.finished = 0;

  RowIds row_ids[kRows];
  int loaded[kRows][kChunk];
  bool valid[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row_ids[r] = RowIds(sizes, ids, head, tile * kTile + r * kCountThreads + thread);
    row_ids[r].load(0, loaded[r]);
  }
  for (int s = thread; s < sizes.segments; s += kCountThreads) marked[s] = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row_ids[r].locate(sizes, batch);
    const int found = row_ids[r].exists() ? row_ids[r].check(loaded[r]) : -1;
    valid[r] = found >= 0;
    row_ids[r].to_blocks(valid[r], loaded[r]);
    if (row_ids[r].exists() && counts.data != nullptr) {
      const int row = tile * kTile + r * kCountThreads + thread, token = sizes.by_group(row);
      counts.data[head * counts.head_stride + token * counts.token_stride +
                  (row - token * sizes.group) * counts.group_stride] = max(found, 0);
    }
  }
  const auto for_each_id = [&](const auto& f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for_each_chunk(row_ids[r], valid[r], sizes.slots, loaded[r], [&](const int(&id)[kChunk], int) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) f(id[j]);
      });
    }
  };
  if (!one_pass) {
    __syncthreads();
    for_each_id([&](int id) {
      if (id >= 0) marked[id / kSegment] = 1;
    });
    __syncthreads();
  }

  std::uint16_t* to = scratch.counts + (static_cast<std::int64_t>(head) * sizes.tiles + tile) * sizes.max_blocks;
  for (int first = 0; first < sizes.segments; first += at_once) {
    if (!one_pass) {
      const bool mine = thread < at_once && first + thread < sizes.segments && marked[first + thread] != 0;
      if (__syncthreads_or(mine) == 0) continue;
    }
    const int begin = first * kSegment, end = min(sizes.max_blocks, (first + at_once) * kSegment);
    for (int b = thread; b < end - begin; b += kCountThreads) count_of[b] = 0;
    __syncthreads();
    for_each_id([&](int id) {
      if (id >= begin && id < end) atomicAdd(&count_of[id - begin], 1);
    });
    __syncthreads();
    if (one_pass) {
      for (int b = thread; b < end; b += kCountThreads) {
        if (count_of[b] != 0) marked[b / kSegment] = 1;
      }
      __syncthreads();
    }
    for (int b = thread; b < end - begin; b += kCountThreads) {
      if (marked[first + b / kSegment] != 0) to[begin + b] = static_cast<std::uint16_t>(count_of[b]);
    }
  }
  for (int s = thread; s < sizes.segments; s += kCountThreads) {
    scratch.marks[(static_cast<std::int64_t>(head) * sizes.segments + s) * sizes.tiles + tile] = marked[s];
  }
}

// Offsets of all lists from their sums, by one CTA: each warp takes kEach * 32 lists side by side.
__device__ void scan_lists(const std::int32_t* sums, std::int64_t lists, std::int64_t base, std::int64_t* offsets) {
  constexpr int kEach = 8;
  __shared__ std::int64_t scan_scratch[kScanScratch];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (std::int64_t first = 0; first < lists; first += 1024 * kEach) {
    const std::int64_t mine = first + warp * (kEach * 32) + lane;
    std::int64_t sum[kEach], of_warp = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum[i] = mine + i * 32 < lists ? __ldcg(sums + mine + i * 32) : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      std::int64_t total;
      sum[i] = of_warp + scan_warp(sum[i], &total);
      of_warp += total;
    }
    std::int64_t all;
    const std::int64_t warps_before = scan_block(lane == 0 ? of_warp : 0, scan_scratch, &all);
    const std::int64_t before = base + __shfl_sync(kAllLanes, warps_before, 0);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (mine + i * 32 < lists) offsets[mine + i * 32] = before + sum[i];
    }
    base += all;
  }
  if (threadIdx.x == 0) offsets[lists] = base;
}

// 32 blocks by 32 runs of tiles; grid: (blocks / 32, heads).
__global__ void __launch_bounds__(1024)
    scan_tiles(Sizes sizes, IndexScratch scratch, const std::int64_t* offsets_begin, std::int64_t* offsets) {
  ptx::start_behind_previous();
  constexpr int kAtOnce = 8;
  __shared__ int run_sum[32][33];
  const int lane = static_cast<int>(threadIdx.x) % 32, run = static_cast<int>(threadIdx.x) / 32;
  const int first_block = static_cast<int>(blockIdx.x) * 32, block = first_block + lane;
  const int head = static_cast<int>(blockIdx.y), n = sizes.max_blocks;
  const int per_run = (sizes.tiles + 31) / 32, begin = min(sizes.tiles, run * per_run),
            end = min(sizes.tiles, begin + per_run);
  const std::uint8_t* marks =
      scratch.marks + (static_cast<std::int64_t>(head) * sizes.segments + first_block / kSegment) * sizes.tiles;
  const std::int64_t column = static_cast<std::int64_t>(head) * sizes.tiles * n + block;
  // Counts of kAtOnce tiles, all loads in flight; 0 where the tile has nothing in the segment.
  const auto load = [&](int first, bool(&there)[kAtOnce], int(&count)[kAtOnce]) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) there[i] = block < n && first + i < end && __ldg(marks + first + i) != 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      count[i] = there[i] ? __ldg(scratch.counts + column + static_cast<std::int64_t>(first + i) * n) : 0;
    }
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
  if (lane == 0 && first_block + run < n) {
    scratch.sums[static_cast<std::int64_t>(head) * n + first_block + run] = total;
    __threadfence();
  }
  __syncthreads();
  sum = run_sum[run][lane];
  for (int first = begin; first < end; first += kAtOnce) {
    if (per_run > kAtOnce) load(first, there, count);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (there[i]) scratch.before[column + static_cast<std::int64_t>(first + i) * n] = sum;
      sum += count[i];
    }
  }

  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    is_last = atomicAdd(scratch.finished, 1) == static_cast<int>(gridDim.x * gridDim.y) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  scan_lists(scratch.sums, static_cast<std::int64_t>(gridDim.y) * n, offsets_begin != nullptr ? *offsets_begin : 0,
             offsets);
}

Sizes sizes_of(const Shape& shape, const Slab& slab) {
  const int rows = slab.tokens * shape.group, tiles = std::max(1, divide_up(rows, kTile));
  return {Divide(shape.group),
          slab.token_begin,
          shape.group,
          shape.slots,
          rows,
          tiles,
          shape.max_blocks,
          divide_up(shape.max_blocks, kSegment),
          shape.batch};
}

// Where the parts of the scratch memory stand.
struct ScratchLayout {
  std::size_t counts, sums, marks, finished, bytes;

  ScratchLayout(const Sizes& s, int heads) {
    const std::size_t lists = static_cast<std::size_t>(heads) * static_cast<std::size_t>(s.max_blocks);
    const std::size_t tiles = static_cast<std::size_t>(s.tiles);
    counts = aligned(sizeof(std::int32_t) * lists * tiles);
    sums = counts + aligned(sizeof(std::uint16_t) * lists * tiles);
    marks = sums + aligned(sizeof(std::int32_t) * lists);
    finished = marks + aligned(static_cast<std::size_t>(heads) * static_cast<std::size_t>(s.segments) * tiles);
    bytes = finished + aligned(sizeof(int));
  }
  IndexScratch parts(void* memory) const {
    char* const begin = static_cast<char*>(memory);
    return {reinterpret_cast<std::int32_t*>(begin), reinterpret_cast<std::uint16_t*>(begin + counts),
            reinterpret_cast<std::int32_t*>(begin + sums), reinterpret_cast<std::uint8_t*>(begin + marks),
            reinterpret_cast<int*>(begin + finished)};
  }
};

// With windows of at most kThreads blocks, as large as the device has the shared memory for.
template <int kIds, int kThreads, bool kStaged>
void launch_place_rows(const Sizes& sizes, int heads, const Batch& batch, const IdsView<const std::int32_t>& ids,
                       const Index& index, const IndexScratch& scratch, cudaStream_t stream) {
  constexpr std::size_t kReserve = 1024;  // what the kernel holds besides
  const int staged = kStaged ? kTile * sizes.slots : 0;
  int window = std::clamp((sizes.max_blocks + 31) / 32 * 32, 32, kThreads);
  const auto bytes = [&] { return PlaceMemory::bytes(window, staged, sizes.segments); };
  if (bytes() + kReserve > 48 * 1024) {
    for (const auto most = static_cast<std::size_t>(most_shared_memory()); bytes() + kReserve > most;)
      window = window / 64 * 32;
  }
  launch(Start::early, place_rows<kIds, kThreads, kStaged>, dim3(sizes.tiles, heads), kThreads, bytes(), stream, sizes,
         window, batch, ids, index, scratch);
}

}  // namespace

std::size_t index_scratch_bytes(const Shape& shape, Slab slab) {
  return ScratchLayout(sizes_of(shape, slab), slab.heads).bytes;
}

void index(const Shape& shape, Slab slab, Batch batch, IdsView<const std::int32_t> ids, CountsView counts,
           const Index& index, const std::int64_t* offsets_begin, void* scratch, cudaStream_t stream) {
  const Sizes sizes = sizes_of(shape, slab);
  const IndexScratch parts = ScratchLayout(sizes, slab.heads).parts(scratch);
  const std::size_t count_bytes =
      sizeof(int) * kSegment * static_cast<std::size_t>(std::min(sizes.segments, kSegmentsAtOnce)) +
      static_cast<std::size_t>(sizes.segments);
  launch(Start::early, count_ids, dim3(sizes.tiles, slab.heads), kCountThreads, count_bytes, stream, sizes, batch, ids,
         counts, parts);
  launch(Start::early, scan_tiles, dim3(std::max(1, divide_up(sizes.max_blocks, 32)), slab.heads), 1024, 0, stream,
         sizes, parts, offsets_begin, index.offsets);
  // Each window costs barriers and a look at every id: many blocks want wide ones, at one CTA an SM.
  const auto place = sizes.slots > 16          ? launch_place_rows<8, 1024, false>
                     : sizes.slots > 8         ? launch_place_rows<16, 1024, true>
                     : sizes.max_blocks > 1024 ? launch_place_rows<8, 1024, true>
                                               : launch_place_rows<8, 512, true>;
  place(sizes, slab.heads, batch, ids, index, parts, stream);
}

}  // namespace moba::cuda
