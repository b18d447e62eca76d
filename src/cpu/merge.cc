// merge: partial results over disjoint key sets become one, weighted by exp(lse_i - lse).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/merge.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.h"
#include "cpu/lanes-inl.h"
#include "cpu/targets.h"
#include "cpu/workers.h"
#include "parallel.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

inline float lse_at(const Outputs& outputs, std::int64_t token, std::int64_t head) {
  return static_cast<const float*>(outputs.lse.data)[head * outputs.lse.stride[0] + token * outputs.lse.stride[1]];
}

void MergeRow(std::span<const Outputs> partials, const Outputs& outputs, std::int64_t token, std::int64_t head) {
  const F32 df;
  const std::int64_t dim = outputs.out.shape[2], padded = RoundUp(dim, kLanes);
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  float maximum = kMinusInf;
  for (const Outputs& partial : partials) maximum = std::max(maximum, lse_at(partial, token, head));
  alignas(64) float total[256] = {}, row[256] = {};  // the longest head dim
  float sum = 0.0f;
  for (const Outputs& partial : partials) {
    const float lse = lse_at(partial, token, head);
    if (lse == kMinusInf) continue;  // no key: its out says nothing
    const float weight = std::exp(lse - maximum);
    Widen(partial.out.dtype, head_row(partial.out, token, head), row, dim);
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      hn::Store(hn::MulAdd(hn::Set(df, weight), hn::Load(df, row + i), hn::Load(df, total + i)), df, total + i);
    }
    sum += weight;
  }
  const VF factor = hn::Set(df, sum == 0.0f ? 0.0f : 1.0f / sum);
  for (std::int64_t i = 0; i < padded; i += kLanes) hn::Store(hn::Mul(hn::Load(df, total + i), factor), df, total + i);
  Narrow(outputs.out.dtype, total, head_row(outputs.out, token, head), dim);
  if (outputs.lse.given()) {
    static_cast<float*>(outputs.lse.data)[head * outputs.lse.stride[0] + token * outputs.lse.stride[1]] =
        sum == 0.0f ? kMinusInf : maximum + std::log(sum);
  }
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(MergeRow);

void merge(const Call& call, std::span<const Outputs> partials, const Outputs& outputs) {
  constexpr std::int64_t kStep = 64;
  const Plan::Impl& plan = call.plan;
  const std::int64_t tokens = plan.problem.total_q;
  const auto merge_row = MOBA_KERNEL(MergeRow, plan.cpu_target);
  parallel_for(plan.threads, ceil_div(tokens, kStep), [&](std::int64_t task, int) {
    for (std::int64_t token = task * kStep; token < std::min(tokens, (task + 1) * kStep); ++token) {
      for (std::int64_t head = 0; head < plan.problem.q_heads; ++head) merge_row(partials, outputs, token, head);
    }
  });
}

}  // namespace moba::cpu
#endif
