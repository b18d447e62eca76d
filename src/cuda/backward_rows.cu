// row_values(): what the products of backward need of each row besides q and dout.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "cuda/chunk.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/row_terms.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 2;  // of a lane, so that enough loads are in flight

struct Rows {
  int q_head_begin, q_heads;  // of the slab
  int token_begin, tokens;
  int group, head_dim;
  float scale;  // kLeastScale or more
};

// dout . out of one row, for its kGroup lanes: their chunks, multiplied and added up.
template <class T, int kGroup>
__device__ __forceinline__ float row_dot(const uint4& a, const uint4& b) {
  const std::uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 u = ptx::unpack<T>(x[j]), v = ptx::unpack<T>(y[j]);
    sum += u.x * v.x + u.y * v.y;
  }
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

__device__ __forceinline__ void store_values(const RowValues& values, std::int64_t to, float scale, float lse,
                                             float delta) {
  if (values.terms != nullptr) {
    values.terms[to] = row_terms(lse / scale, delta);
  } else {
    values.lse[to] = lse * std::numbers::log2e_v<float>;
    values.delta[to] = delta;
  }
}

// kGroup lanes take kTokens tokens of a head; the heads stand side by side, as in memory.
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    value_rows(Rows slab, View<const void> out, View<const void> dout, View<const void> lse, RowValues values) {
  ptx::let_next_start();
  // 32 bits: a tensor spans up to 64 GiB, and a row of it 64 bytes or more.
  const int i = static_cast<int>(blockIdx.x * (kThreads / kGroup) + threadIdx.x / kGroup);
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int pair = i / slab.q_heads, head = i - pair * slab.q_heads, key_head = head / slab.group;
  const auto chunk = [&](const View<const void>& view, int token) {
    if (token >= slab.tokens || lane * 8 >= slab.head_dim) return splat(0);
    return __ldcs(reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(view.data) +
                                                 (slab.token_begin + std::int64_t{token}) * view.token_stride +
                                                 (slab.q_head_begin + head) * view.head_stride) +
                  lane);
  };
  uint4 of_out[kTokens], of_dout[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    of_out[t] = chunk(out, pair * kTokens + t);
    of_dout[t] = chunk(dout, pair * kTokens + t);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float delta = row_dot<T, kGroup>(of_out[t], of_dout[t]);
    const std::int64_t token = pair * kTokens + t;
    if (lane != t || token >= slab.tokens) continue;
    const std::int64_t to = (key_head * std::int64_t{slab.tokens} + token) * slab.group + head % slab.group;
    const float row_lse = static_cast<const float*>(
        lse.data)[(slab.q_head_begin + head) * lse.head_stride + (slab.token_begin + token) * lse.token_stride];
    // A row without keys has no weights.
    const bool empty = row_lse == -INFINITY;
    store_values(values, to, slab.scale, empty ? INFINITY : row_lse, empty ? 0 : delta);
  }
  if (i == 0 && lane == 0) {
    store_values(values, std::int64_t{slab.tokens} * slab.q_heads, slab.scale, INFINITY, 0);  // behind all
  }
  ptx::end_behind_previous();
}

template <class T>
auto value_kernel(int head_dim) {
  return with_lanes(head_dim, [](auto lanes) { return value_rows<T, lanes()>; });
}

}  // namespace

std::int64_t row_value_count(const Shape& shape, Slab slab) {
  return std::int64_t{slab.heads} * slab.tokens * shape.group + 1;
}

void row_values(const Shape& shape, Slab slab, View<const void> out, View<const void> dout, View<const void> lse,
                const RowValues& values, cudaStream_t stream) {
  const Rows rows{slab.head_begin * shape.group,
                  slab.heads * shape.group,
                  slab.token_begin,
                  slab.tokens,
                  shape.group,
                  shape.head_dim,
                  std::max(shape.scale, kLeastScale)};
  const std::int64_t groups = std::int64_t{divide_up(std::max(1, slab.tokens), kTokens)} * rows.q_heads;
  const int groups_of_cta = kThreads / lanes_of(shape.head_dim);
  const std::int64_t ctas = (groups + groups_of_cta - 1) / groups_of_cta;
  launch(
      Start::beside,
      shape.dtype == DType::bf16 ? value_kernel<__nv_bfloat16>(shape.head_dim) : value_kernel<__half>(shape.head_dim),
      dim3(static_cast<unsigned>(ctas)), kThreads, 0, stream, rows, out, dout, lse, values);
}

}  // namespace moba::cuda
