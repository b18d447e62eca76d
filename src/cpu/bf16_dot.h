// Products of bfloat16 pairs (AVX512_BF16): two multiply-adds per element and instruction, accumulated in float32.
#pragma once

#include <cstdint>

#include "cpu/next_rows.h"
#include "moba/info.h"

namespace moba::cpu {

// available: the processor and the operating system have AVX512_BF16. preferred: its products outrun float32 FMA. On
// AMD (Zen 4, Zen 5) vdpbf16ps issues as often as an FMA; on Intel's Sapphire and Emerald Rapids a quarter as often
// (measured: 164 against 330 GFLOP/s), so widening wins there.
Bf16Support bf16_dot_support();

// product-inl.h's Multiply for pairs: a [rows][depth] words, b packed in panels of 64 columns of words
// [b_depth][width], depth and b_depth counted in words; c = a b, or with accumulate c = alpha c + a b.
void multiply_pairs(bool accumulate, const float* a, std::int64_t lda, std::int64_t rows, const float* b,
                    std::int64_t b_depth, std::int64_t columns, std::int64_t limit, std::int64_t depth, float* const* c,
                    const float* alpha, NextRows next);

}  // namespace moba::cpu
