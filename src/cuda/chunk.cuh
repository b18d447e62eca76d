// Chunks of 16 bytes: what a lane moves of a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace moba::cuda {

inline constexpr std::uint32_t kNanPair = 0x7fff7fff;  // two NaN, f16 or bf16

// Lanes of a row, a chunk each; for head dims between the powers of two some have none.
constexpr int lanes_of(int head_dim) { return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32; }

// f(their number as a constant), for kernels that are made for it.
template <class F>
auto with_lanes(int head_dim, const F& f) {
  switch (lanes_of(head_dim)) {
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    default:
      return f(std::integral_constant<int, 32>{});
  }
}

__device__ __forceinline__ uint4 splat(std::uint32_t word) { return make_uint4(word, word, word, word); }

}  // namespace moba::cuda
