// Descriptions of tensors for the copy engine of sm_90.
#pragma once

#include <cuda.h>

#include "cuda/contract.h"

namespace moba::cuda {

// A map of view [tokens, heads, head_dim] of f16 or bf16 whose coordinates are (column, head, token). A copy brings the
// box of 64 columns, box_heads heads and box_tokens tokens as rows of 128 bytes, the heads of a token side by side,
// 16-byte chunk c of row r at place c ^ (r % 8) (the operand of ptx/wgmma.cuh). What lies outside of the tensor, tokens
// below 0 among it, comes as zeros. head_dim is a multiple of 64, tokens >= 1, box_tokens 1 to 256, box_heads too. The
// strides of a dimension of length 1 do not matter.
CUtensorMap tensor_map_3d(DType dtype, const View<const void>& view, int head_dim, int heads, int tokens,
                          int box_tokens, int box_heads = 1);

}  // namespace moba::cuda
