// lse and delta of a row as terms that products can add up: backward_sm90 subtracts both from what it computes by one
// more product, with weights of 1 for the terms that it wants, which costs less than reading them in every lane.
//
// -lse / scale, to be added to scores before the scale, and -delta are each the sum of three bfloat16: 24 bits, as many
// as a float has. A row has them in 16 bytes: those of lse in 0 to 2, of delta in 3 to 5, then two zeros.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/ptx/math.cuh"

namespace moba::cuda {

// lse is divided by no smaller scale, or its terms would not be finite where the scale is 0. To exp2 the two are alike:
// a score times either is as good as 0.
inline constexpr float kLeastScale = 1e-36f;

// Infinities become the largest numbers there are terms of: times a weight of 0 they would be NaN. exp2 of such a
// number is 0 or infinity even at the least scale. NaN stays.
__device__ __forceinline__ float finite_sum(float x) {
  constexpr float kLargest = 3e38f;
  return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
}

__device__ __forceinline__ uint4 row_terms(float scaled_lse, float delta) {
  float rest[2] = {finite_sum(-scaled_lse), finite_sum(-delta)}, term[8] = {};
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    term[i] = __bfloat162float(__float2bfloat16_rn(rest[i / 3]));
    rest[i / 3] -= term[i];
  }
  const auto pair = [&](int i) { return ptx::pack<__nv_bfloat16>(term[2 * i], term[2 * i + 1]); };
  return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

// A row of the weights that pick the terms of lse (0) or of delta (1): halves, for wgmma_add_terms() adds all twice.
__device__ __forceinline__ uint4 term_weights(int which) {
  constexpr std::uint32_t kHalf = 0x3f00;  // the bits of bfloat16 0.5
  if (which == 0) return make_uint4(kHalf | kHalf << 16, kHalf, 0, 0);
  return make_uint4(0, kHalf << 16, kHalf | kHalf << 16, 0);
}

}  // namespace moba::cuda
