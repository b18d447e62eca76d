// Chunks of 16 bytes: what a lane moves of a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moba::cuda {

inline constexpr std::uint32_t kNanPair = 0x7fff7fff;  // two NaN, f16 or bf16

// Lanes of a row, a chunk each; for head dims between the powers of two some have none.
constexpr int lanes_of(int head_dim) { return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32; }

__device__ __forceinline__ uint4 splat(std::uint32_t word) { return make_uint4(word, word, word, word); }

}  // namespace moba::cuda
