// Rows of out [Tq, Hq, d] from partial results: merge() through the positions of the slab's index, merge_partials()
// from the caller's tensors; fill_dense_rest() writes the rows that dense attention has no unit for.
#include <cmath>
#include <numbers>

#include "cuda/batch.cuh"
#include "cuda/chunk.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/math.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;           // partial rows in flight a lane: 3.9 TB/s at 8 slots, 4.1 at 16, on an H200
constexpr float kNoWeight = -1.0f;  // of a partial that is not there: its out says nothing

template <class T>
__device__ __forceinline__ void add_weighted(float (&sum)[8], float weight, const uint4& chunk) {
  const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::unpack<T>(words[i]);
    sum[2 * i] += weight * pair.x;
    sum[2 * i + 1] += weight * pair.y;
  }
}

struct Rows {
  int head_begin, token_begin, rows;  // rows of a key head of the slab
  int group, max_blocks, slots, head_dim;
};

// kGroup lanes a row, d / 8 of them with a chunk of 16 bytes; grid: (rows, heads of the slab). Rows of tokens in no
// sequence are invalid to index too. kOnce: at most kLoads slots.
template <class T, int kGroup, bool kOnce>
__global__ void __launch_bounds__(kThreads, kOnce ? 5 : 4)
    merge_rows(Rows rows, Index index, Partials partials, View<void> out, LseView lse) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int row = static_cast<int>(blockIdx.x) * (kThreads / kGroup) + static_cast<int>(threadIdx.x) / kGroup;
  const int head = static_cast<int>(blockIdx.y), slots = rows.slots;
  const bool is_row = row < rows.rows, has_chunk = is_row && lane * 8 < rows.head_dim;
  const std::int32_t* positions =
      index.positions + (static_cast<std::int64_t>(head) * rows.rows + (is_row ? row : 0)) * slots;
  const std::int64_t head_entry = index.offsets[static_cast<std::int64_t>(head) * rows.max_blocks];
  const float* lse_of_head = partials.lse + head_entry;
  const uint4* out_of_head =
      static_cast<const uint4*>(partials.out) + head_entry * (rows.head_dim / 8) + (has_chunk ? lane : 0);

  // Lane i holds slot i % 8 of each batch of 8 slots.
  const auto position_of = [&](int slot) { return is_row && slot < slots ? __ldcs(positions + slot) : -1; };
  const auto lse_of = [&](int position) { return position >= 0 ? __ldg(lse_of_head + position) : -INFINITY; };
  int position = position_of(lane % kLoads);
  const bool invalid = __shfl_sync(kAllLanes, position, 0, kGroup) == kInvalidRow;
  float slot_lse = lse_of(position), highest = slot_lse;
  const auto highest_of_group = [](float value) {
#pragma unroll
    for (int step = 1; step < kLoads; step *= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
  };
  if constexpr (!kOnce) {
    for (int first = kLoads; first < slots; first += kLoads) {
      highest = fmaxf(highest, lse_of(position_of(first + lane % kLoads)));
    }
    highest = highest_of_group(highest);
  }

  float sum[8] = {}, weights = 0.0f;
  for (int first = 0; kOnce ? first == 0 : first < slots; first += kLoads) {
    if (first > 0) {
      position = position_of(first + lane % kLoads);
      slot_lse = lse_of(position);
    }
    uint4 chunk[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int entry = __shfl_sync(kAllLanes, position, i, kGroup);
      chunk[i] = entry >= 0 && has_chunk ? __ldcs(out_of_head + static_cast<std::int64_t>(entry) * (rows.head_dim / 8))
                                         : splat(0);
    }
    if constexpr (kOnce) highest = highest_of_group(highest);  // the loads are under way
    const float mine = slot_lse == -INFINITY ? kNoWeight : ptx::exp2_approx(slot_lse - highest);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float weight = __shfl_sync(kAllLanes, mine, i, kGroup);
      if (weight != kNoWeight) {
        add_weighted<T>(sum, weight, chunk[i]);
        weights += weight;
      }
    }
  }
  const float factor = weights == 0.0f ? 0.0f : 1.0f / weights;
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = ptx::pack<T>(sum[2 * i] * factor, sum[2 * i + 1] * factor);
  quad_transpose(words, lane);
  if (!has_chunk) return;

  const int token_in_slab = row / rows.group;
  const std::int64_t token = rows.token_begin + token_in_slab;
  const int q_head = (rows.head_begin + head) * rows.group + row - token_in_slab * rows.group;
  uint4* to = reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(out.data) + token * out.token_stride +
                                       q_head * out.head_stride) +
              lane;
  __stcs(to, invalid ? splat(kNanPair) : make_uint4(words[0], words[1], words[2], words[3]));
  if (lane == 0 && lse.data != nullptr) {
    const float value =
        weights == 0.0f ? -INFINITY : (highest + ptx::log2_approx(weights)) * std::numbers::ln2_v<float>;
    lse.data[q_head * lse.head_stride + token * lse.token_stride] = invalid ? NAN : value;
  }
}

template <class T, bool kOnce>
auto merge_kernel(int head_dim) {
  return with_lanes(head_dim, [](auto lanes) { return merge_rows<T, lanes(), kOnce>; });
}

template <class T>
auto merge_kernel(const Shape& shape) {
  return shape.slots <= kLoads ? merge_kernel<T, true>(shape.head_dim) : merge_kernel<T, false>(shape.head_dim);
}

// A thread has 16 bytes of a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_caller_rows(CallerPartials partials, std::int64_t rows, int heads, int lanes, View<void> out, LseView lse) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = thread / lanes;
  if (row >= rows) return;
  const int lane = static_cast<int>(thread - row * lanes);
  const std::int64_t token = row / heads;
  const int head = static_cast<int>(row - token * heads);
  const auto lse_of = [&](int i) {
    const View<const void>& view = partials.lse[i];
    return __ldg(static_cast<const float*>(view.data) + head * view.head_stride + token * view.token_stride);
  };
  float highest = -INFINITY;
#pragma unroll 8
  for (int i = 0; i < partials.count; ++i) highest = fmaxf(highest, lse_of(i));
  float sum[8] = {}, weights = 0.0f;
  for (int first = 0; first < partials.count; first += kLoads) {
    uint4 chunk[kLoads];
    float weight[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      weight[i] = kNoWeight;
      if (first + i >= partials.count) continue;
      const View<const void>& view = partials.out[first + i];
      chunk[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(view.data) +
                                                      token * view.token_stride + head * view.head_stride) +
                       lane);
      const float value = lse_of(first + i);
      if (value != -INFINITY) weight[i] = expf(value - highest);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (weight[i] == kNoWeight) continue;
      add_weighted<T>(sum, weight[i], chunk[i]);
      weights += weight[i];
    }
  }
  const float factor = weights == 0.0f ? 0.0f : 1.0f / weights;
  uint4* to = reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(out.data) + token * out.token_stride +
                                       head * out.head_stride) +
              lane;
  *to = make_uint4(ptx::pack<T>(sum[0] * factor, sum[1] * factor), ptx::pack<T>(sum[2] * factor, sum[3] * factor),
                   ptx::pack<T>(sum[4] * factor, sum[5] * factor), ptx::pack<T>(sum[6] * factor, sum[7] * factor));
  if (lane == 0 && lse.data != nullptr) {
    lse.data[head * lse.head_stride + token * lse.token_stride] = weights == 0.0f ? -INFINITY : highest + logf(weights);
  }
}

enum class Rest { none, empty, nan };

// What a token's rows need that no unit writes.
__device__ __forceinline__ Rest rest_of(const Batch& batch, int sequences, bool causal, int token) {
  const int number = find_sequence(batch, sequences, token);
  if (number < 0) return Rest::nan;
  const DeviceSequence s = batch.sequences[number];
  const int position = s.k_len - s.q_len + token - s.q_begin;
  return s.k_len == 0 || (causal && position < 0) ? Rest::empty : Rest::none;
}

// Each lane looks at a token; the warp then writes the rows of those that need it.
__global__ void __launch_bounds__(kThreads)
    fill_rows(Batch batch, int sequences, bool causal, int tokens, int heads, int chunks, View<void> out, LseView lse) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int mine = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const Rest rest = mine < tokens ? rest_of(batch, sequences, causal, mine) : Rest::none;
  const unsigned nan = __ballot_sync(kAllLanes, rest == Rest::nan);
  for (unsigned left = __ballot_sync(kAllLanes, rest != Rest::none); left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    const bool is_nan = (nan >> from & 1) != 0;
    const std::int64_t token = mine - lane + from;
    for (int i = lane; i < heads * chunks; i += 32) {
      const int head = i / chunks;
      reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(out.data) + token * out.token_stride +
                               head * out.head_stride)[i - head * chunks] = splat(is_nan ? kNanPair : 0);
    }
    if (lse.data == nullptr) continue;
    for (int head = lane; head < heads; head += 32) {
      lse.data[head * lse.head_stride + token * lse.token_stride] = is_nan ? NAN : -INFINITY;
    }
  }
}

}  // namespace

void merge(const Shape& shape, Slab slab, const Index& index, const Partials& partials, View<void> out, LseView lse,
           cudaStream_t stream) {
  const Rows rows{slab.head_begin, slab.token_begin, slab.tokens * shape.group, shape.group, shape.max_blocks,
                  shape.slots,     shape.head_dim};
  const int rows_per_cta = kThreads / lanes_of(shape.head_dim);
  launch(shape.dtype == DType::bf16 ? merge_kernel<__nv_bfloat16>(shape) : merge_kernel<__half>(shape),
         dim3(divide_up(rows.rows, rows_per_cta), slab.heads), kThreads, 0, stream, rows, index, partials, out, lse);
}

void merge_partials(const Shape& shape, const CallerPartials& partials, View<void> out, LseView lse,
                    cudaStream_t stream) {
  const std::int64_t rows = static_cast<std::int64_t>(shape.total_q) * shape.q_heads;
  const int lanes = shape.head_dim / 8;
  launch(shape.dtype == DType::bf16 ? merge_caller_rows<__nv_bfloat16> : merge_caller_rows<__half>,
         dim3(static_cast<unsigned>((rows * lanes + kThreads - 1) / kThreads)), kThreads, 0, stream, partials, rows,
         shape.q_heads, lanes, out, lse);
}

void fill_dense_rest(const Shape& shape, Batch batch, View<void> out, LseView lse, cudaStream_t stream) {
  launch(fill_rows, dim3(divide_up(shape.total_q, kThreads)), kThreads, 0, stream, batch, shape.batch, shape.causal,
         shape.total_q, shape.q_heads, shape.head_dim / 8, out, lse);
}

}  // namespace moba::cuda
