// The one matrix product of the cpu backend: rows times a packed panel matrix.
//
// a: [rows][depth] floats, row stride lda.
// b: [b_depth][columns] packed in panels of kPanel columns: panel p holds [b_depth][width] floats one after the other,
//    width = kPanel but for the last panel, which is as wide as what is left (a multiple of kLanes).
// c: one pointer per row, columns floats each; so results may be scattered.
// Only depth <= b_depth is summed, and only the panels that begin below column `limit` are computed.
//
// 6 rows x 4 vectors of accumulators fill 24 of 32 registers (6 x 2 of 16): rows come in by broadcast loads, and each
// vector of b serves 6 rows. Every element of c is one chain of multiply-adds in ascending depth, whatever rows and
// columns stand beside it: equal rows and columns give equal bits.
#if defined(MOBA_CPU_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_PRODUCT_INL_H_
#undef MOBA_CPU_PRODUCT_INL_H_
#else
#define MOBA_CPU_PRODUCT_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>

#include "cpu/lanes-inl.h"
#include "cpu/next_rows.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

constexpr int kProductRows = 6;
constexpr std::int64_t kStepDepth = 16;  // one step of NextRows for so much depth

// c = a b, or with kAccumulate c = alpha c + a b, for M rows and one panel of NV vectors.
template <bool kAccumulate, int M, int NV>
HWY_NOINLINE void MultiplyPanel(const float* HWY_RESTRICT a, std::int64_t lda, const float* HWY_RESTRICT b,
                                std::int64_t depth, float* const* c, std::int64_t column, const float* alpha,
                                NextRows& next) {
  const F32 df;
  VF sum[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      sum[i][j] = hn::Zero(df);
      if (kAccumulate) sum[i][j] = hn::Mul(hn::Set(df, alpha[i]), hn::LoadU(df, c[i] + column + j * kLanes));
    }
  }
  for (std::int64_t k = 0; k < depth;) {
    next.step();
    for (const std::int64_t end = std::min(depth, k + kStepDepth); k < end; ++k, b += NV * kLanes) {
      VF column_vector[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) column_vector[j] = hn::LoadU(df, b + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const VF row = hn::Set(df, a[i * lda + k]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[i][j] = hn::MulAdd(row, column_vector[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) hn::StoreU(sum[i][j], df, c[i] + column + j * kLanes);
  }
}

template <bool kAccumulate, int M>
void MultiplyRows(const float* a, std::int64_t lda, const float* panel, std::int64_t width, std::int64_t depth,
                  float* const* c, std::int64_t column, const float* alpha, NextRows& next) {
  const std::int64_t vectors = width / kLanes;
  if constexpr (kPanelVectors == 4) {
    if (vectors == 4) return MultiplyPanel<kAccumulate, M, 4>(a, lda, panel, depth, c, column, alpha, next);
    if (vectors == 3) return MultiplyPanel<kAccumulate, M, 3>(a, lda, panel, depth, c, column, alpha, next);
  }
  if (vectors == 2) return MultiplyPanel<kAccumulate, M, 2>(a, lda, panel, depth, c, column, alpha, next);
  MultiplyPanel<kAccumulate, M, 1>(a, lda, panel, depth, c, column, alpha, next);
}

// The whole product: panel by panel, so that one panel stays in L1 while the rows pass. What is needed next comes to L2
// meanwhile.
template <bool kAccumulate>
void Multiply(const float* a, std::int64_t lda, std::int64_t rows, const float* b, std::int64_t b_depth,
              std::int64_t columns, std::int64_t limit, std::int64_t depth, float* const* c, const float* alpha,
              NextRows next = {}) {
  next.spread((limit + kPanel - 1) / kPanel * ((rows + kProductRows - 1) / kProductRows) *
              ((depth + kStepDepth - 1) / kStepDepth));
  for (std::int64_t column = 0; column < limit; column += kPanel) {
    const std::int64_t width = std::min(kPanel, columns - column);
    const float* panel = b + column * b_depth;
    for (std::int64_t i = 0; i < rows; i += kProductRows) {
      const float* from = a + i * lda;
      const float* factors = kAccumulate ? alpha + i : nullptr;
      switch (rows - i) {
        case 1:
          MultiplyRows<kAccumulate, 1>(from, lda, panel, width, depth, c + i, column, factors, next);
          break;
        case 2:
          MultiplyRows<kAccumulate, 2>(from, lda, panel, width, depth, c + i, column, factors, next);
          break;
        case 3:
          MultiplyRows<kAccumulate, 3>(from, lda, panel, width, depth, c + i, column, factors, next);
          break;
        case 4:
          MultiplyRows<kAccumulate, 4>(from, lda, panel, width, depth, c + i, column, factors, next);
          break;
        case 5:
          MultiplyRows<kAccumulate, 5>(from, lda, panel, width, depth, c + i, column, factors, next);
          break;
        default:
          MultiplyRows<kAccumulate, 6>(from, lda, panel, width, depth, c + i, column, factors, next);
          break;
      }
    }
  }
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
