// The products of backward: c += a b with b in plain rows, so that what is a left operand of one product can be the
// right one of another without being packed for it.
//
// a: [rows][depth] floats, row stride lda; or with kTransposed [depth][rows].
// b: [depth][columns] floats, row stride ldb; columns is a multiple of kLanes.
// c: one pointer per row, columns floats each.
//
// Register tiles and the order of the sums are those of product-inl.h: every element of c is one chain of multiply-adds
// in ascending depth that begins with what c held.
#if defined(MOBA_CPU_ROWS_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_ROWS_PRODUCT_INL_H_
#undef MOBA_CPU_ROWS_PRODUCT_INL_H_
#else
#define MOBA_CPU_ROWS_PRODUCT_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>

#include "cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

constexpr int kAddRows = 6;

struct RowsOperands {
  const float* a;
  std::int64_t lda;
  const float* b;
  std::int64_t ldb, depth;
};

// M rows and NV vectors of c, from `column` on; a and b point at the first of each.
template <bool kTransposed, int M, int NV>
HWY_NOINLINE void AddPanel(const RowsOperands& operands, float* const* c, std::int64_t column) {
  const F32 df;
  const float* HWY_RESTRICT a = operands.a;
  const float* HWY_RESTRICT b = operands.b;
  const std::int64_t lda = operands.lda, ldb = operands.ldb;
  VF sum[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sum[i][j] = hn::LoadU(df, c[i] + column + j * kLanes);
  }
  for (std::int64_t k = 0; k < operands.depth; ++k, b += ldb) {
    VF column_vector[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) column_vector[j] = hn::LoadU(df, b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const VF row = hn::Set(df, kTransposed ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] = hn::MulAdd(row, column_vector[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) hn::StoreU(sum[i][j], df, c[i] + column + j * kLanes);
  }
}

template <bool kTransposed, int M>
void AddRows(const RowsOperands& operands, std::int64_t width, float* const* c, std::int64_t column) {
  const std::int64_t vectors = width / kLanes;
  if constexpr (kPanelVectors == 4) {
    if (vectors == 4) return AddPanel<kTransposed, M, 4>(operands, c, column);
    if (vectors == 3) return AddPanel<kTransposed, M, 3>(operands, c, column);
  }
  if (vectors == 2) return AddPanel<kTransposed, M, 2>(operands, c, column);
  AddPanel<kTransposed, M, 1>(operands, c, column);
}

template <bool kTransposed>
void AddProduct(const RowsOperands& operands, std::int64_t rows, std::int64_t columns, float* const* c) {
  for (std::int64_t column = 0; column < columns; column += kPanel) {
    const std::int64_t width = std::min(kPanel, columns - column);
    for (std::int64_t i = 0; i < rows; i += kAddRows) {
      RowsOperands part = operands;
      part.a += kTransposed ? i : i * operands.lda;
      part.b += column;
      switch (rows - i) {
        case 1:
          AddRows<kTransposed, 1>(part, width, c + i, column);
          break;
        case 2:
          AddRows<kTransposed, 2>(part, width, c + i, column);
          break;
        case 3:
          AddRows<kTransposed, 3>(part, width, c + i, column);
          break;
        case 4:
          AddRows<kTransposed, 4>(part, width, c + i, column);
          break;
        case 5:
          AddRows<kTransposed, 5>(part, width, c + i, column);
          break;
        default:
          AddRows<kTransposed, 6>(part, width, c + i, column);
          break;
      }
    }
  }
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
