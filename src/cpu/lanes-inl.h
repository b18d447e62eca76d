// Vector helpers of the cpu backend, one copy per instruction set: widths, conversions of rows, 2^x.
// Included once per target by way of hwy/foreach_target.h, hence the toggled guard.
#if defined(MOBA_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_LANES_INL_H_
#undef MOBA_CPU_LANES_INL_H_
#else
#define MOBA_CPU_LANES_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "cpu/targets.h"
#include "moba/tensor.h"
#include "numeric.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using I32 = hn::RebindToSigned<F32>;
using U32 = hn::RebindToUnsigned<F32>;
using U16 = hn::Rebind<std::uint16_t, F32>;  // as many lanes as F32
using VF = hn::Vec<F32>;

constexpr std::int64_t kLanes = hn::MaxLanes(F32());

// Columns of a packed panel (product-inl.h): 4 vectors where there are 32 registers (or no vectors at all), else 2.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
constexpr int kPanelVectors = 2;
#else
constexpr int kPanelVectors = 4;
#endif
constexpr std::int64_t kPanel = kPanelVectors * kLanes;

// Keys are packed as columns in multiples of this: whole vectors, and 4 at a time.
constexpr std::int64_t kKeyStep = kLanes < 4 ? 4 : kLanes;

#undef MOBA_VECTOR_F16
// Conversion of binary16 in hardware; elsewhere one value at a time through numeric.h.
#if MOBA_IS_AVX512(HWY_TARGET) || HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_NEON
#define MOBA_VECTOR_F16 1
#else
#define MOBA_VECTOR_F16 0
#endif

constexpr std::int64_t RoundUp(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The bits of `v` rounded to bfloat16 (nearest even) in the upper half of each lane; a NaN stays one.
HWY_INLINE hn::Vec<U32> RoundToBf16(VF v) {
  const U32 du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded);
}

// dst[0..n) = src[0..n) widened to float.
inline void Widen(DType dtype, const void* src, float* HWY_RESTRICT dst, std::int64_t n) {
  const F32 df;
  std::int64_t i = 0;
  if (dtype == DType::f32) {
    const float* from = static_cast<const float*>(src);
    for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::LoadU(df, from + i), df, dst + i);
  } else if (dtype == DType::bf16) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(src);
    for (; i + kLanes <= n; i += kLanes) {
      const auto wide = hn::PromoteTo(U32(), hn::LoadU(U16(), from + i));
      hn::StoreU(hn::BitCast(df, hn::ShiftLeft<16>(wide)), df, dst + i);
    }
  } else {
#if MOBA_VECTOR_F16
    const hn::Rebind<hwy::float16_t, F32> dh;
    const hwy::float16_t* from = static_cast<const hwy::float16_t*>(src);
    for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::PromoteTo(df, hn::LoadU(dh, from + i)), df, dst + i);
#endif
  }
  for (; i < n; ++i) dst[i] = load_float(src, dtype, i);
}

// dst[0..n) = src[0..n) rounded to dtype.
inline void Narrow(DType dtype, const float* HWY_RESTRICT src, void* dst, std::int64_t n) {
  const F32 df;
  std::int64_t i = 0;
  if (dtype == DType::f32) {
    float* to = static_cast<float*>(dst);
    for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::LoadU(df, src + i), df, to + i);
  } else if (dtype == DType::bf16) {
    std::uint16_t* to = static_cast<std::uint16_t*>(dst);
    for (; i + kLanes <= n; i += kLanes) {
      const auto upper = hn::ShiftRight<16>(RoundToBf16(hn::LoadU(df, src + i)));
      hn::StoreU(hn::DemoteTo(U16(), hn::BitCast(I32(), upper)), U16(), to + i);
    }
  } else {
#if MOBA_VECTOR_F16
    const hn::Rebind<hwy::float16_t, F32> dh;
    hwy::float16_t* to = static_cast<hwy::float16_t*>(dst);
    for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::DemoteTo(dh, hn::LoadU(df, src + i)), dh, to + i);
#endif
  }
  for (; i < n; ++i) store_float(dst, dtype, i, src[i]);
}

// 2^t for t <= 0, relative error 1.2e-7; below 2^-126 it is 0; NaN stays NaN. (2^fraction by a polynomial of degree 5,
// fitted for the least relative error on [-1/2, 1/2]; 10 operations, half of what a full-range exp takes.)
HWY_INLINE VF Exp2(VF t) {
  const F32 df;
  const I32 di;
  const auto n = hn::NearestInt(t);
  const auto f = hn::Sub(t, hn::ConvertTo(df, n));
  auto p = hn::Set(df, 0.001326472731307149f);
  p = hn::MulAdd(p, f, hn::Set(df, 0.009671512991189957f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.05550733581185341f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.24022242426872253f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.6931470036506653f));
  p = hn::MulAdd(p, f, hn::Set(df, 1.0f));
  const auto power = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
  return hn::IfThenZeroElse(hn::Lt(t, hn::Set(df, -126.0f)), hn::Mul(p, power));
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
