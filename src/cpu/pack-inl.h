// Packing of keys and values into the panels of product-inl.h, and gathering of query rows.
//
// Two element forms share one layout of 32-bit words: float, and the bfloat16 pair of bf16_dot.h (two elements that are
// neighbours along the depth of the product in one word).
#if defined(MOBA_CPU_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_PACK_INL_H_
#undef MOBA_CPU_PACK_INL_H_
#else
#define MOBA_CPU_PACK_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "call.h"
#include "cpu/lanes-inl.h"
#include "cpu/workers.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

// Rows of one head: row i starts at data + i * stride bytes; in a paged cache, i counts within its page.
struct HeadRows {
  const std::byte* data;
  std::int64_t stride;
  DType dtype;
  std::int64_t dim;
  KeyPages pages = {};

  const std::byte* row(std::int64_t i) const {
    if (pages.ids == nullptr) return data + i * stride;
    const std::int64_t element = static_cast<std::int64_t>(size_in_bytes(dtype));
    return data + pages.ids[i / pages.size] * pages.stride * element + i % pages.size * stride;
  }
};

inline HeadRows HeadOf(const ConstTensor& t, std::int64_t head, const KeyPages& pages = {}) {
  return {head_row(t, 0, head), t.stride[0] * static_cast<std::int64_t>(size_in_bytes(t.dtype)), t.dtype, t.shape[2],
          pages};
}

// to[0..words) = the row as bfloat16 pairs, the odd last one completed by a zero.
inline void CopyPairs(const std::byte* row, std::int64_t dim, float* to) {
  to[(dim - 1) / 2] = 0.0f;
  std::memcpy(to, row, static_cast<std::size_t>(dim) * 2);
}

// Writes the transpose of 4 rows of `words` words into columns column .. column + 3 of the panel matrix at `packed`.
inline void Transpose4(const std::array<const float*, 4>& rows, std::int64_t words, std::int64_t column,
                       std::int64_t columns, float* packed) {
  const std::int64_t panel = column / kPanel * kPanel;
  const std::int64_t width = std::min(kPanel, columns - panel);
  float* to = packed + panel * words + (column - panel);
  std::int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Full128<float> d4;
  const hn::Full128<double> d2;
  for (; i + 4 <= words; i += 4) {
    const auto r0 = hn::LoadU(d4, rows[0] + i), r1 = hn::LoadU(d4, rows[1] + i);
    const auto r2 = hn::LoadU(d4, rows[2] + i), r3 = hn::LoadU(d4, rows[3] + i);
    const auto a = hn::BitCast(d2, hn::InterleaveLower(d4, r0, r1)),
               b = hn::BitCast(d2, hn::InterleaveLower(d4, r2, r3));
    const auto c = hn::BitCast(d2, hn::InterleaveUpper(d4, r0, r1)),
               d = hn::BitCast(d2, hn::InterleaveUpper(d4, r2, r3));
    hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, a, b)), d4, to + (i + 0) * width);
    hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, a, b)), d4, to + (i + 1) * width);
    hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, c, d)), d4, to + (i + 2) * width);
    hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, c, d)), d4, to + (i + 3) * width);
  }
#endif
  for (; i < words; ++i) {
    for (int r = 0; r < 4; ++r) std::memcpy(to + i * width + r, rows[r] + i, sizeof(float));
  }
}

// packed = [words][columns] of the keys first .. first + count: a row of `from` becomes a column; columns from count up
// to RoundUp(count, kKeyStep) are zero. words = dim, or (dim + 1) / 2 with kPairs.
template <bool kPairs>
void PackKeys(const HeadRows& from, std::int64_t first, std::int64_t count, float* packed) {
  alignas(64) float buffer[4][256] = {};  // the longest head dim
  const std::int64_t words = kPairs ? (from.dim + 1) / 2 : from.dim;
  const std::int64_t columns = RoundUp(count, kKeyStep);
  for (std::int64_t column = 0; column < columns; column += 4) {
    std::array<const float*, 4> rows;
    for (std::int64_t r = 0; r < 4; ++r) {
      rows[r] = buffer[r];
      if (column + r >= count) {
        std::memset(buffer[r], 0, static_cast<std::size_t>(words) * sizeof(float));
      } else if (kPairs) {
        CopyPairs(from.row(first + column + r), from.dim, buffer[r]);
      } else if (from.dtype == DType::f32) {
        rows[r] = reinterpret_cast<const float*>(from.row(first + column + r));
      } else {
        Widen(from.dtype, from.row(first + column + r), buffer[r], from.dim);
      }
    }
    Transpose4(rows, words, column, columns, packed);
  }
}

// packed = [count][columns] of the values first .. first + count, columns = RoundUp(dim, kLanes), those past dim zero.
// Returns whether every value is finite.
inline bool PackValues(const HeadRows& from, std::int64_t first, std::int64_t count, float* packed) {
  const F32 df;
  const std::int64_t columns = RoundUp(from.dim, kLanes);
  VF poison = hn::Zero(df);  // becomes NaN where a value times zero is not zero
  alignas(64) float buffer[256];
  for (std::int64_t j = 0; j < count; ++j) {
    std::memset(buffer + columns - kLanes, 0, static_cast<std::size_t>(kLanes) * sizeof(float));
    Widen(from.dtype, from.row(first + j), buffer, from.dim);
    for (std::int64_t panel = 0; panel < columns; panel += kPanel) {
      const std::int64_t width = std::min(kPanel, columns - panel);
      float* to = packed + panel * count + j * width;
      for (std::int64_t i = 0; i < width; i += kLanes) {
        const VF value = hn::Load(df, buffer + panel + i);
        poison = hn::MulAdd(value, hn::Zero(df), poison);
        hn::StoreU(value, df, to + i);
      }
    }
  }
  return hn::AllFalse(df, hn::IsNaN(poison));
}

// The same in pairs: [(count + 1) / 2][columns] words, a word holding keys 2j (low half) and 2j + 1.
inline bool PackValuePairs(const HeadRows& from, std::int64_t first, std::int64_t count, float* packed) {
  const U32 du;
  const std::int64_t columns = RoundUp(from.dim, kLanes), words = (count + 1) / 2;
  auto not_finite = hn::Zero(du);
  alignas(64) std::uint16_t pair[2][256 + 64];
  std::memset(pair, 0, sizeof(pair));
  for (std::int64_t j = 0; j < words; ++j) {
    for (std::int64_t r = 0; r < 2; ++r) {
      const bool present = 2 * j + r < count;
      if (present) std::memcpy(pair[r], from.row(first + 2 * j + r), static_cast<std::size_t>(from.dim) * 2);
      if (!present) std::memset(pair[r], 0, sizeof(pair[r]));
    }
    for (std::int64_t panel = 0; panel < columns; panel += kPanel) {
      const std::int64_t width = std::min(kPanel, columns - panel);
      float* to = packed + panel * words + j * width;
      for (std::int64_t i = 0; i < width; i += kLanes) {
        const auto low = hn::PromoteTo(du, hn::LoadU(U16(), pair[0] + panel + i));
        const auto high = hn::PromoteTo(du, hn::LoadU(U16(), pair[1] + panel + i));
        const auto word = hn::Or(low, hn::ShiftLeft<16>(high));
        for (const std::uint32_t exponent : {0x7f80u, 0x7f800000u}) {
          const auto all = hn::Set(du, exponent);
          not_finite = hn::Or(not_finite, hn::VecFromMask(du, hn::Eq(hn::And(word, all), all)));
        }
        hn::StoreU(hn::BitCast(F32(), word), F32(), to + i);
      }
    }
  }
  return hn::AllTrue(du, hn::Eq(not_finite, hn::Zero(du)));
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
