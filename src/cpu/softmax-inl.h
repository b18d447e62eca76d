// Scores to probabilities, a row of a tile at a time.
// Included once per target by way of hwy/foreach_target.h, hence the toggled guard.
#if defined(MOBA_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_SOFTMAX_INL_H_
#undef MOBA_CPU_SOFTMAX_INL_H_
#else
#define MOBA_CPU_SOFTMAX_INL_H_
#endif

#include <hwy/highway.h>

#include <limits>

#include "cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Scales row[0..seen), fills the vector that seen ends in with -inf, and returns the maximum of it and `start`.
inline float ScaleAndMax(float* row, std::int64_t seen, float factor, float start) {
  const F32 df;
  const VF scale = hn::Set(df, factor);
  VF maximum = hn::Set(df, start);
  std::int64_t j = 0;
  for (; j + kLanes <= seen; j += kLanes) {
    const VF s = hn::Mul(scale, hn::LoadU(df, row + j));
    hn::StoreU(s, df, row + j);
    maximum = hn::Max(maximum, s);
  }
  if (j < seen) {
    const auto inside = hn::FirstN(df, static_cast<std::size_t>(seen - j));
    const VF s = hn::IfThenElse(inside, hn::Mul(scale, hn::LoadU(df, row + j)), hn::Set(df, kMinusInf));
    hn::StoreU(s, df, row + j);
    maximum = hn::Max(maximum, s);
  }
  return hn::GetLane(hn::MaxOfLanes(df, maximum));
}

// row = 2^(row - reference), zero from seen up to `most` rounded up to whole vectors; returns the sum.
inline float Exponentials(float* row, std::int64_t seen, std::int64_t most, float reference) {
  const F32 df;
  const VF subtract = hn::Set(df, reference);
  VF sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j < seen; j += kLanes) {
    const VF p = Exp2(hn::Sub(hn::LoadU(df, row + j), subtract));
    hn::StoreU(p, df, row + j);
    sum = hn::Add(sum, p);
  }
  for (; j < most; j += kLanes) hn::StoreU(hn::Zero(df), df, row + j);
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
