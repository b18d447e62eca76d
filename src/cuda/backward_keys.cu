// dk and dv behind the products of backward: the sums of what several units have of the same keys, and the keys that no
// unit has.
#include "cuda/batch.cuh"
#include "cuda/chunk.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;      // shares in flight a thread
constexpr int kCtasPerSm = 8;  // of sum_splits

template <class T>
__device__ __forceinline__ uint2 pack(const float4& x) {
  return make_uint2(ptx::pack<T>(x.x, x.y), ptx::pack<T>(x.z, x.w));
}

__device__ __forceinline__ void add(float4& sum, const float4& x) {
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

// Four columns from `column` on of key token `token`.
__device__ __forceinline__ uint2* place(const View<void>& view, std::int64_t token, int head, int column) {
  return reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(view.data) + token * view.token_stride +
                                  head * view.head_stride + column);
}

// A thread adds up 4 columns of the shares of a split; persistent: the number of splits is on the device.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_splits(ShareList list, const float* shares, int part_keys, int head_dim,
                                                       View<void> dk, View<void> dv, KeyTotals totals) {
  ptx::let_next_start();
  const int sum_quads = part_keys * head_dim / 4, pieces = (2 * sum_quads + kThreads - 1) / kThreads;
  const std::int64_t items = static_cast<std::int64_t>(list.counters[1]) * pieces;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Split split = list.splits[item / pieces];
    const int quad = static_cast<int>(item % pieces) * kThreads + static_cast<int>(threadIdx.x);
    const bool is_dv = quad >= sum_quads;
    const int in_sum = is_dv ? quad - sum_quads : quad, key = in_sum * 4 / head_dim,
              column = in_sum * 4 - key * head_dim;
    if (quad >= 2 * sum_quads || key >= split.keys) continue;
    const float4* from =
        reinterpret_cast<const float4*>(shares) + static_cast<std::int64_t>(split.first) * (2 * sum_quads) + quad;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int first = 0; first < split.count; first += kLoads) {
      float4 share[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        share[i] = first + i < split.count ? __ldcs(from + static_cast<std::int64_t>(first + i) * (2 * sum_quads))
                                           : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) add(sum, share[i]);
    }
    const std::int64_t token = split.key_begin + key;
    if (totals.dk == nullptr) {
      *place(is_dv ? dv : dk, token, split.head, column) = pack<T>(sum);
      continue;
    }
    float4* total = reinterpret_cast<float4*>((is_dv ? totals.dv : totals.dk) + token * head_dim + column);
    add(sum, *total);
    *total = sum;
  }
}

// A thread writes 4 columns of dk and dv of a token.
template <class T>
__global__ void __launch_bounds__(kThreads) round_totals(Batch batch, int sequences, int tokens, int head, int head_dim,
                                                         KeyTotals totals, View<void> dk, View<void> dv) {
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4, token = i / head_dim;
  if (token >= tokens) return;
  const int column = static_cast<int>(i - token * head_dim);
  const bool lies = find_key_sequence(batch, sequences, static_cast<int>(token)) >= 0;
  const uint2 nan = make_uint2(kNanPair, kNanPair);
  *place(dk, token, head, column) = lies ? pack<T>(*reinterpret_cast<const float4*>(totals.dk + i)) : nan;
  *place(dv, token, head, column) = lies ? pack<T>(*reinterpret_cast<const float4*>(totals.dv + i)) : nan;
}

enum class Rest { none, zero, nan };

struct Keys {
  int tokens, head_begin, heads, head_dim;
  int block_size, max_blocks, sequences;
};

// What the keys of a token need that no unit writes. `offsets` is null for dense.
__device__ __forceinline__ Rest rest_of(const Keys& keys, const Batch& batch, const std::int64_t* offsets, int token,
                                        int head) {
  const int number = find_key_sequence(batch, keys.sequences, token);
  if (number < 0) return Rest::nan;
  const DeviceSequence s = batch.sequences[number];
  if (offsets == nullptr) return s.q_len == 0 ? Rest::zero : Rest::none;
  const std::int64_t list =
      static_cast<std::int64_t>(head) * keys.max_blocks + s.block_begin + (token - s.k_begin) / keys.block_size;
  return offsets[list] == offsets[list + 1] ? Rest::zero : Rest::none;
}

// Each lane looks at a token; the warp then writes the keys of those that need it. Grid: (tokens, heads of the slab).
__global__ void __launch_bounds__(kThreads)
    fill_rest(Keys keys, Batch batch, const std::int64_t* offsets, View<void> dk, View<void> dv) {
  ptx::let_next_start();
  const int lane = static_cast<int>(threadIdx.x) % 32, head_in_slab = static_cast<int>(blockIdx.y);
  const int mine = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const Rest rest = mine < keys.tokens ? rest_of(keys, batch, offsets, mine, head_in_slab) : Rest::none;
  const unsigned nan = __ballot_sync(kAllLanes, rest == Rest::nan);
  for (unsigned left = __ballot_sync(kAllLanes, rest != Rest::none); left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    const std::uint32_t word = (nan >> from & 1) != 0 ? kNanPair : 0;
    for (int column = lane * 4; column < keys.head_dim; column += 32 * 4) {
      *place(dk, mine - lane + from, keys.head_begin + head_in_slab, column) = make_uint2(word, word);
      *place(dv, mine - lane + from, keys.head_begin + head_in_slab, column) = make_uint2(word, word);
    }
  }
}

}  // namespace

void sum_shares(const Shape& shape, const Pass& pass, const ShareList& list, const float* shares, View<void> dk,
                View<void> dv, const KeyTotals& totals, cudaStream_t stream) {
  launch(shape.dtype == DType::bf16 ? sum_splits<__nv_bfloat16> : sum_splits<__half>,
         dim3(static_cast<unsigned>(shape.sm_count * kCtasPerSm)), kThreads, 0, stream, list, shares, pass.part_keys,
         shape.head_dim, dk, dv, totals);
}

void write_totals(const Shape& shape, Batch batch, int head, const KeyTotals& totals, View<void> dk, View<void> dv,
                  cudaStream_t stream) {
  const std::int64_t quads = std::int64_t{shape.total_k} * shape.head_dim / 4;
  launch(shape.dtype == DType::bf16 ? round_totals<__nv_bfloat16> : round_totals<__half>,
         dim3(static_cast<unsigned>((quads + kThreads - 1) / kThreads)), kThreads, 0, stream, batch, shape.batch,
         shape.total_k, head, shape.head_dim, totals, dk, dv);
}

void fill_keys(const Shape& shape, Slab slab, Batch batch, const Index* index, View<void> dk, View<void> dv,
               cudaStream_t stream) {
  const Keys keys{shape.total_k,    slab.head_begin,  slab.heads, shape.head_dim,
                  shape.block_size, shape.max_blocks, shape.batch};
  launch(fill_rest, dim3(divide_up(shape.total_k, kThreads), slab.heads), kThreads, 0, stream, keys, batch,
         index == nullptr ? nullptr : index->offsets, dk, dv);
}

}  // namespace moba::cuda
