#include "cpu/bf16_dot.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MOBA_HAS_BF16_DOT 1
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#else
#define MOBA_HAS_BF16_DOT 0
#include <cstdlib>
#endif

namespace moba::cpu {

#if MOBA_HAS_BF16_DOT

Bf16Support bf16_dot_support() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return {};
  const bool has_bf16 = (a >> 5) & 1u;
  // __builtin_cpu_supports also asks the operating system whether it saves the 512-bit registers.
  if (!has_bf16 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return {};
  unsigned vendor[3] = {};
  __get_cpuid(0, &a, &vendor[0], &vendor[2], &vendor[1]);
  char text[12];
  std::memcpy(text, vendor, sizeof(text));
  return {.available = true, .preferred = std::string_view(text, sizeof(text)) == "AuthenticAMD"};
}

namespace {

constexpr std::int64_t kRows = 6, kLanes = 16, kPanel = 64;
constexpr std::int64_t kStepDepth = 16;  // one step of NextRows for so many words of depth

template <int M, int NV>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"), noinline)) void multiply_panel(
    bool accumulate, const float* a, std::int64_t lda, const float* b, std::int64_t depth, float* const* c,
    std::int64_t column, const float* alpha, NextRows& next) {
  __m512 sum[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      sum[i][j] = _mm512_setzero_ps();
      if (accumulate) sum[i][j] = _mm512_mul_ps(_mm512_set1_ps(alpha[i]), _mm512_loadu_ps(c[i] + column + j * kLanes));
    }
  }
  for (std::int64_t k = 0; k < depth;) {
    next.step();
    for (const std::int64_t end = std::min(depth, k + kStepDepth); k < end; ++k, b += NV * kLanes) {
      __m512bh columns[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) columns[j] = (__m512bh)_mm512_loadu_ps(b + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const __m512bh row = (__m512bh)_mm512_set1_ps(a[i * lda + k]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, columns[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c[i] + column + j * kLanes, sum[i][j]);
  }
}

using Panel = void (*)(bool, const float*, std::int64_t, const float*, std::int64_t, float* const*, std::int64_t,
                       const float*, NextRows&);

template <int M>
constexpr Panel kPanels[4] = {multiply_panel<M, 1>, multiply_panel<M, 2>, multiply_panel<M, 3>, multiply_panel<M, 4>};
constexpr const Panel* kKernels[kRows] = {kPanels<1>, kPanels<2>, kPanels<3>, kPanels<4>, kPanels<5>, kPanels<6>};

}  // namespace

void multiply_pairs(bool accumulate, const float* a, std::int64_t lda, std::int64_t rows, const float* b,
                    std::int64_t b_depth, std::int64_t columns, std::int64_t limit, std::int64_t depth, float* const* c,
                    const float* alpha, NextRows next) {
  next.spread((limit + kPanel - 1) / kPanel * ((rows + kRows - 1) / kRows) * ((depth + kStepDepth - 1) / kStepDepth));
  for (std::int64_t column = 0; column < limit; column += kPanel) {
    const std::int64_t vectors = std::min<std::int64_t>(kPanel, columns - column) / kLanes;
    for (std::int64_t i = 0; i < rows; i += kRows) {
      const std::int64_t m = std::min<std::int64_t>(kRows, rows - i);
      kKernels[m - 1][vectors - 1](accumulate, a + i * lda, lda, b + column * b_depth, depth, c + i, column,
                                   accumulate ? alpha + i : nullptr, next);
    }
  }
}

#else

Bf16Support bf16_dot_support() { return {}; }

void multiply_pairs(bool, const float*, std::int64_t, std::int64_t, const float*, std::int64_t, std::int64_t,
                    std::int64_t, std::int64_t, float* const*, const float*, NextRows) {
  std::abort();  // never chosen by a plan: bf16_dot_support() says that there is none
}

#endif

}  // namespace moba::cpu
