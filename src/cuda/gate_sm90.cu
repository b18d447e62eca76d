// gate on sm_90: the scores of query rows against the centroids by wgmma, and the exact top-k of each row. The scores
// live in registers, 64 rows by 128 centroids of a warpgroup at a time.
//
//   q          [tokens, Hq, d]; the g heads of a key head are packed, row = token * g + head in group
//   centroids  [max_blocks, Hk, d]
//   ids        slots of a row: the chosen blocks within the sequence, ascending, the own block the last; then -1
//
// One persistent kernel of 2 or 3 consumer warpgroups of 64 rows and a producer warpgroup: one producer warp brings the
// centroids (tensor copies of 128, newest first), one for each consumer its rows of q and the limits of their
// candidates. A tile of rows may span several sequences; its columns are the blocks from the oldest candidate of its
// first row to the newest of its last one, masked by row where they need it.
//
// The selection (gate_select.cuh) on a 64 x 128 accumulator, where a row is spread over the 4 lanes of a quad:
//   1. Running maxima of 16 (32) disjoint groups of columns, kept by lane.
//   2. The threshold: the maximum of rank k among the groups is a lower bound of the k-th best score. By a network on
//      bfloat16 pairs, both rows of a lane at once; rounded down, the bound holds.
//   3. Scores above the threshold are appended to the row's list in shared memory, in pairs of columns: counted, prefix
//   sum
//      over the quad, stored. Because the maxima run, few pass. Computed for random scores: 8 pairs of the first tile
//      for rank 7, 8 / t of tile t (17 for rank 15). Hence the exact rank: a threshold of rank 16 where 15 would do
//      overflows a list of 2 warps in 3 within eight tiles, not of 1 in 11.
//   4. At the end of the row, or where a list would overflow: the exact pick (gate_list.cuh, gate_ids.cuh).
// Newest first, so that an equal score found later loses. Bars are strict (append what is greater), which keeps NaN,
// -inf and masked columns out of the lists without a test; a row whose list then holds too few is filled up by a slow
// path of its own (fill_up in gate_ids.cuh).
//
// By the machine code, k = 8: steps 1 to 3 take 380 instructions for a warp's 16 x 128 scores, step 4 about 600.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "cuda/contract.h"
#include "cuda/gate_ids.cuh"
#include "cuda/gate_items.cuh"
#include "cuda/gate_list.cuh"
#include "cuda/gate_select.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/swizzle.cuh"
#include "cuda/tensor_map.h"

namespace moba::cuda {
namespace gating {
namespace {

// ---- The producers ----

template <class C>
__device__ __forceinline__ void load_centroids(const Arguments& a, const CUtensorMap& map, const Shared<C>& shared) {
  const bool leader = (threadIdx.x & 31) == 0;
  int copied = 0;
  for (int i = 0; has_item(a, i); ++i) {
    const Item item = item_at<C>(a, i);
    const Span span = span_of<C>(a, item);
    if (!leader) continue;
    const int head = a.slab.head_begin + item.head;
#pragma unroll 1
    for (int first = span.high - kColumns; first > span.low - kColumns; first -= kColumns, ++copied) {
      const int stage = copied % C::kStages;
      const bool half = is_half(span, first);
      const std::uint32_t full = shared.tile_full(stage);
      ptx::barrier_wait(shared.tile_empty(stage), ((copied / C::kStages) & 1) ^ 1);
      ptx::barrier_arrive_expect(full, half ? C::kTileBytes / 2 : C::kTileBytes);
      for (int x = 0; x < C::kDim; x += 64) {
        const std::uint32_t to = shared.tile(stage) + x * (kColumns * 2);
        ptx::copy_tensor_3d(to + 64 * 128, &map, full, x, head, first + 64);
        if (!half) ptx::copy_tensor_3d(to, &map, full, x, head, first);
      }
    }
  }
}

// One warp for a consumer: its rows of q as an operand of wgmma, with their limits. Each item is handed over, those
// without scores as well. A tensor copy where the group divides 64, by cp.async where it does not. What a row past the
// last holds does not matter.
template <class C>
__device__ __forceinline__ void load_queries(const Arguments& a, const CUtensorMap& map, const Shared<C>& shared,
                                             int consumer) {
  constexpr int kChunks = C::kDim / 8, kRowsAtOnce = 32 / kChunks;  // 16-byte chunks of a row; rows of a copy
  const int lane = threadIdx.x & 31, chunk = lane % kChunks;
  const std::uint32_t full = shared.queries_full(consumer);
  const auto* q = static_cast<const std::uint16_t*>(a.q.data);
  for (int i = 0; has_item(a, i); ++i) {
    const Item item = item_at<C>(a, i);
    const Span span = span_of<C>(a, item);
    Limits limits[2];
    std::int64_t offset[2];  // of the rows `lane` and `lane + 32`
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = clamp_row(a, item.row, consumer * 64 + half * 32 + lane), token = a.by_group(row);
      const int head = (a.slab.head_begin + item.head) * a.shape.group + row - token * a.shape.group;
      limits[half] = limits_of(a, token);
      offset[half] = (a.slab.token_begin + token) * a.q.token_stride + head * a.q.head_stride;
    }
    ptx::barrier_wait(shared.queries_empty(consumer), (i & 1) ^ 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::store_shared(shared.limits(i, consumer, half * 32 + lane), static_cast<std::uint32_t>(limits[half].low),
                        static_cast<std::uint32_t>(limits[half].high));
    }
    if (lane == 0) {
      ptx::store_shared(shared.span(i, consumer), static_cast<std::uint32_t>(span.low),
                        static_cast<std::uint32_t>(span.high));
    }
    const bool scored = span.low < span.high;
    if (scored && !a.queries_by_box) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll 2
        for (int r = 0; r < 32; r += kRowsAtOnce) {
          const int row = half * 32 + r + lane / kChunks;
          const std::int64_t from = __shfl_sync(kAllLanes, offset[half], r + lane / kChunks);
          ptx::copy_async(shared.queries(consumer) + swizzled_band(64, row, chunk), q + from + chunk * 8);
        }
      }
    }
    ptx::copy_async_arrive(full);
    __syncwarp();
    if (lane == 0) {
      if (scored && a.queries_by_box) {
        const int token = a.slab.token_begin + a.by_group(clamp_row(a, item.row, consumer * 64));
        const int head = (a.slab.head_begin + item.head) * a.shape.group;
        ptx::barrier_arrive_expect(full, C::kQueryBytes);
        for (int x = 0; x < C::kDim; x += 64) {
          ptx::copy_tensor_3d(shared.queries(consumer) + x * (64 * 2), &map, full, x, head, token);
        }
      } else {
        ptx::barrier_arrive(full);
      }
    }
  }
}

// ---- The consumers ----

// scores = the warpgroup's rows of q by column groups begin .. 15 of a tile.
template <class T, int d, int begin>
__device__ __forceinline__ void multiply(float (&scores)[64 - 4 * begin], std::uint32_t queries, std::uint32_t tile) {
  const std::uint32_t columns = tile + begin * (8 * 8);  // in units of 16 bytes, as operands count
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < d / 16; ++k) {
    ptx::wgmma<T>(scores, queries + (k / 4) * (64 * 8) + (k % 4) * 2, columns + (k / 4) * (kColumns * 8) + (k % 4) * 2,
                  k > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin(scores);
}

template <class T, class C>
__device__ __forceinline__ void consume(const Arguments& a, const Shared<C>& shared, int consumer) {
  const int lane = threadIdx.x & 31, warp = uniform(static_cast<int>(threadIdx.x) >> 5) & 3;
  const bool leader = lane == 0;
  const int rank = C::kLowestRank == C::kHighestRank ? C::kHighestRank : a.choose;
  const std::uint32_t warp_lists = shared.lists(consumer) + warp * 256;
  const std::uint32_t queries = ptx::operand(shared.queries(consumer));
  const PairLane pair{warp_lists + (lane >> 1) * 16, (lane & 1) != 0};
  Rows<C> rows;
  rows.list = warp_lists + (lane >> 2) * 16;
  int used = 0;
  for (int i = 0; has_item(a, i); ++i) {
    ptx::barrier_wait(shared.queries_full(consumer), i & 1);
    if (!a.queries_by_box) ptx::fence_async_proxy();
    const Span span = shared.load_span(i, consumer);
    const bool scored = span.low < span.high;
    ptx::barrier_arrive_if(leader && !scored, shared.queries_empty(consumer));
    // Limits ascend with the row.
    const Limits common{uniform(shared.load_limits(i, consumer, warp * 16 + 15).low),
                        uniform(shared.load_limits(i, consumer, warp * 16).high)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.threshold[r] = -INFINITY;
      rows.entries[r] = 0;
#pragma unroll
      for (int g = 0; g < C::kGroups; ++g) rows.maxima[r][g] = -INFINITY;
    }

    for (int first = span.high - kColumns; first > span.low - kColumns; first -= kColumns, ++used) {
      const int stage = used % C::kStages;
      ptx::barrier_wait(shared.tile_full(stage), (used / C::kStages) & 1);
      const auto process = [&](auto begin_constant) {
        constexpr int begin = decltype(begin_constant)::value;
        float scores[64 - 4 * begin];
        multiply<T, C::kDim, begin>(scores, queries, ptx::operand(shared.tile(stage)));
        ptx::barrier_arrive_if(leader, shared.tile_empty(stage));
        ptx::barrier_arrive_if(leader && first <= span.low, shared.queries_empty(consumer));
        if (first + kColumns > common.high || first + 8 * begin < common.low) {
          const int oldest = uniform(shared.load_limits(i, consumer, warp * 16).low);
          const int newest = uniform(shared.load_limits(i, consumer, warp * 16 + 15).high);
          if (first + kColumns <= oldest || first >= newest) return;  // of no row of the warp
          const Limits limits[2] = {shared.load_limits(i, consumer, warp * 16 + (lane >> 2)),
                                    shared.load_limits(i, consumer, warp * 16 + (lane >> 2) + 8)};
          mask<begin>(scores, limits, first, common);
        }
        select<C, begin>(scores, rows, pair, rank, first + 2 * (lane & 3));
      };
      if (is_half(span, first)) {
        process(std::integral_constant<int, kHalf>());
      } else {
        process(std::integral_constant<int, kOldest>());
      }
    }
    const Item item = item_at<C>(a, i);
    const Limits limits = shared.load_limits(i, consumer, warp * 16 + (lane >> 1));
    finish<C>(a, item, item.row + consumer * 64 + warp * 16, limits, rows, pair, rank, scored);
  }
}

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gate_kernel(const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap centroid_map,
                const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  const Shared<C> shared{ptx::shared_address(memory)};
  const int group = uniform(static_cast<int>(threadIdx.x) >> 7);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(shared.tile_full(i), 1);
      ptx::barrier_init(shared.tile_empty(i), C::kConsumers * 4);  // a warp arrives once
    }
    for (int i = 0; i < C::kConsumers; ++i) {
      ptx::barrier_init(shared.queries_full(i), 32 + 1);  // the copies of each lane; the limits
      ptx::barrier_init(shared.queries_empty(i), 4);
    }
    ptx::fence_barrier_init();
  }
  ptx::start_behind_previous();
  __syncthreads();
  if (group == C::kConsumers) {
    ptx::lower_registers<C::kProducerRegisters>();
    const int warp = uniform(static_cast<int>(threadIdx.x) >> 5) & 3;
    if (warp == 0) {
      load_centroids<C>(a, centroid_map, shared);
    } else if (warp <= C::kConsumers) {
      load_queries<C>(a, query_map, shared, warp - 1);
    }
  } else {
    ptx::raise_registers<C::kConsumerRegisters>();
    consume<T, C>(a, shared, group);
  }
}

struct Maps {
  CUtensorMap queries, centroids;
};

template <class T, int d, int capacity, int lowest_rank, int highest_rank>
void launch_gate(const Maps& maps, Arguments a, cudaStream_t stream) {
  using C = Config<d, capacity, lowest_rank, highest_rank>;
  a.tiles = (a.rows - 1) / C::kRows + 1;
  a.items = a.tiles * a.slab.heads;
  launch(Start::early, gate_kernel<T, C>, dim3(std::min(a.shape.sm_count, a.items)), C::kThreads, C::kSharedBytes,
         stream, maps.queries, maps.centroids, a);
}

template <class T, int d>
void launch_gate(const Maps& maps, const Arguments& a, cudaStream_t stream) {
  if (a.choose == 7) {
    launch_gate<T, d, 8, 7, 7>(maps, a, stream);  // k = 8
  } else if (a.choose <= 8) {
    launch_gate<T, d, 8, 1, 8>(maps, a, stream);
  } else {
    launch_gate<T, d, 16, 9, 16>(maps, a, stream);
  }
}

}  // namespace
}  // namespace gating

void gate_sm90(const Shape& shape, Slab slab, Batch batch, View<const void> q, View<const void> centroids,
               IdsView<std::int32_t> ids, CountsView counts, cudaStream_t stream) {
  if (slab.heads == 0 || slab.tokens == 0) return;
  const bool ids_by_four = shape.slots % 4 == 0 && reinterpret_cast<std::uintptr_t>(ids.data) % 16 == 0 &&
                           ids.head_stride % 4 == 0 && ids.token_stride % 4 == 0 && ids.group_stride % 4 == 0;
  const gating::Arguments a{
      .shape = shape,
      .slab = slab,
      .batch = batch,
      .q = q,
      .centroids = centroids,
      .ids = ids,
      .counts = counts,
      .by_group = Divide(shape.group),
      .by_heads = Divide(slab.heads),
      .rows = slab.tokens * shape.group,
      .choose = shape.causal ? shape.slots - 1 : shape.slots,
      .ids_by_four = ids_by_four,
      .queries_by_box = 64 % shape.group == 0,
  };
  gating::Maps maps{};  // not used where nothing is scored
  if (a.choose > 0 && shape.max_blocks > 0) {
    maps.centroids = tensor_map_3d(shape.dtype, centroids, shape.head_dim, shape.kv_heads, shape.max_blocks, 64);
    if (a.queries_by_box) {
      maps.queries = tensor_map_3d(shape.dtype, q, shape.head_dim, shape.group * shape.kv_heads, shape.total_q,
                                   64 / shape.group, shape.group);
    }
  }
  if (shape.dtype == DType::bf16) {
    if (shape.head_dim == 64) {
      gating::launch_gate<__nv_bfloat16, 64>(maps, a, stream);
    } else {
      gating::launch_gate<__nv_bfloat16, 128>(maps, a, stream);
    }
  } else {
    if (shape.head_dim == 64) {
      gating::launch_gate<__half, 64>(maps, a, stream);
    } else {
      gating::launch_gate<__half, 128>(maps, a, stream);
    }
  }
}

}  // namespace moba::cuda
