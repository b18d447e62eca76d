// pool: centroids [blocks, Hk, d], the mean key of each block, in the order of summation that docs/spec.md fixes:
// groups of 64 keys, each added up in ascending order, then the sums of the groups in ascending order.
//
// A thread adds up 8 columns (16 bytes a key) of one group; the groups of a block meet in shared memory, where the
// thread of the first group adds the other sums to its own.
#include <algorithm>

#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/launch.h"
#include "cuda/pool.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"

namespace moba::cuda {

namespace {

constexpr int kMaxThreads = 512;
constexpr int kLoads = 8;  // in flight a thread

// How the threads of a CTA share the work: an item is `lanes` chunks of 8 columns of one (block, head); a CTA has
// `items` of them, each of groups * lanes threads, lanes fastest, and takes `rounds` * groups groups of 64 keys.
struct Layout {
  int heads, segments;  // items of a block: heads * segments, segments fastest
  int items, groups, rounds, lanes;
  std::int64_t all_items;
};

// Adds `keys` keys, 8 columns of each, from element `first` of k on.
template <class T>
__device__ __forceinline__ void sum_keys(float (&sum)[8], const View<const void>& k, std::int64_t first, int keys) {
  const std::uint16_t* from = static_cast<const std::uint16_t*>(k.data) + first;
  int key = 0;
  for (; key + kLoads <= keys; key += kLoads) {
    uint4 chunk[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      chunk[i] = __ldg(reinterpret_cast<const uint4*>(from + (key + i) * k.token_stride));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) add<T>(sum, chunk[i]);
  }
  for (; key < keys; ++key) add<T>(sum, __ldg(reinterpret_cast<const uint4*>(from + key * k.token_stride)));
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    pool_blocks(Layout layout, const DeviceBlock* blocks, View<const void> k, View<void> centroids) {
  ptx::start_behind_previous();
  extern __shared__ float4 sums[];  // [items][groups][2][lanes]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % layout.lanes, slice = thread / layout.lanes;
  const int group = slice % layout.groups, item_in_cta = slice / layout.groups;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * layout.items + item_in_cta;
  const int items_of_block = layout.heads * layout.segments;
  DeviceBlock block{};
  int number = 0, head = 0, column = 0;
  if (item_in_cta < layout.items && item < layout.all_items) {
    number = static_cast<int>(item / items_of_block);
    const int rest = static_cast<int>(item - static_cast<std::int64_t>(number) * items_of_block);
    head = rest / layout.segments;
    column = (rest % layout.segments * layout.lanes + lane) * 8;
    block = blocks[number];
  }
  float total[8];
  clear(total);
  for (int round = 0; round < layout.rounds; ++round) {
    const int begin = (round * layout.groups + group) * kPoolGroup;
    float sum[8];
    clear(sum);
    if (begin < block.keys) {
      sum_keys<T>(sum, k,
                  static_cast<std::int64_t>(block.key_begin + begin) * k.token_stride + head * k.head_stride + column,
                  min(kPoolGroup, block.keys - begin));
    }
    if (group == 0)
      add(total, make_float4(sum[0], sum[1], sum[2], sum[3]), make_float4(sum[4], sum[5], sum[6], sum[7]));
    if (layout.groups == 1) continue;
    float4* place = sums + slice * 2 * layout.lanes + lane;
    if (group > 0 && begin < block.keys) {
      place[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      place[layout.lanes] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll 4
      for (int other = 1; other < layout.groups; ++other) {
        if (begin + other * kPoolGroup >= block.keys) break;
        add(total, place[other * 2 * layout.lanes], place[(other * 2 + 1) * layout.lanes]);
      }
    }
    __syncthreads();
  }
  if (group > 0 || block.keys == 0) return;
  std::uint16_t* to = static_cast<std::uint16_t*>(centroids.data) + number * centroids.token_stride +
                      head * centroids.head_stride + column;
  *reinterpret_cast<uint4*>(to) = mean<T>(total, block.keys);
}

}  // namespace

void pool(const Shape& shape, Batch batch, View<const void> k, View<void> centroids, cudaStream_t stream) {
  const int all_groups = divide_up(shape.block_size, kPoolGroup), all_lanes = shape.head_dim / 8;
  int lanes = all_lanes;  // 4 of them read 64 bytes a key: whole sectors
  if (all_groups * lanes > kMaxThreads) lanes = all_lanes % 8 == 0 && all_groups * 8 <= kMaxThreads ? 8 : 4;
  const int groups = std::min(all_groups, kMaxThreads / lanes);
  const int items = std::max(1, 256 / (groups * lanes)), segments = all_lanes / lanes;
  const Layout layout{shape.kv_heads,
                      segments,
                      items,
                      groups,
                      (all_groups + groups - 1) / groups,
                      lanes,
                      static_cast<std::int64_t>(shape.max_blocks) * shape.kv_heads * segments};
  const int threads = (items * groups * lanes + 31) / 32 * 32;
  const std::size_t shared_bytes = groups > 1 ? sizeof(float4) * 2 * items * groups * lanes : 0;
  const dim3 grid(static_cast<unsigned>((layout.all_items + items - 1) / items));
  launch(Start::early, shape.dtype == DType::bf16 ? pool_blocks<__nv_bfloat16> : pool_blocks<__half>, grid, threads,
         shared_bytes, stream, layout, batch.blocks, k, centroids);
}

}  // namespace moba::cuda
