// rope: rotates pairs of dimensions of q and k by position. Every element is computed in float64 from float32 operands,
// so that no order of operations can change a bit, then rounded to float32 and to the dtype.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rope.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>

#include "call.h"
#include "cpu/lanes-inl.h"
#include "cpu/rope.h"
#include "cpu/targets.h"
#include "cpu/workers.h"
#include "parallel.h"
#include "rope_table.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

// to0 = x0 cos - x1 sin, to1 = x1 cos + x0 sin, for n pairs; the buffers may be read and written up to whole vectors.
inline void rotate(const float* HWY_RESTRICT x0, const float* HWY_RESTRICT x1, const float* HWY_RESTRICT cos,
                   const float* HWY_RESTRICT sin, std::int64_t n, float* HWY_RESTRICT to0, float* HWY_RESTRICT to1) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> df;
  for (std::int64_t i = 0; i < n; i += hn::MaxLanes(dd)) {
    const auto a = hn::PromoteTo(dd, hn::LoadU(df, x0 + i)), b = hn::PromoteTo(dd, hn::LoadU(df, x1 + i));
    const auto c = hn::PromoteTo(dd, hn::LoadU(df, cos + i)), s = hn::PromoteTo(dd, hn::LoadU(df, sin + i));
    hn::StoreU(hn::DemoteTo(df, hn::Sub(hn::Mul(a, c), hn::Mul(b, s))), df, to0 + i);
    hn::StoreU(hn::DemoteTo(df, hn::Add(hn::Mul(b, c), hn::Mul(a, s))), df, to1 + i);
  }
}

// Rotates the heads of token `from` of x into token `to` of `rotated`.
void RotateToken(const ConstTensor& x, std::int64_t from, const Tensor& rotated, std::int64_t to,
                 const RopeTask& task) {
  const std::int64_t dim = x.shape[2], pairs = task.pairs;
  alignas(64) float row[256 + kLanes], result[256 + kLanes], first[128 + kLanes], second[128 + kLanes];
  alignas(64) float first_result[128 + kLanes], second_result[128 + kLanes];
  for (std::int64_t head = 0; head < x.shape[1]; ++head) {
    Widen(x.dtype, head_row(x, from, head), row, dim);
    if (task.factor != 1.0f) std::transform(row, row + dim, row, [&](float value) { return task.factor * value; });
    std::copy_n(row + 2 * pairs, dim - 2 * pairs, result + 2 * pairs);
    if (task.style == RopeStyle::half_split) {
      std::copy_n(row, pairs, first);
      std::copy_n(row + pairs, pairs, second);
    } else {
      for (std::int64_t i = 0; i < pairs; ++i) first[i] = row[2 * i], second[i] = row[2 * i + 1];
    }
    rotate(first, second, task.cos, task.sin, pairs, first_result, second_result);
    if (task.style == RopeStyle::half_split) {
      std::copy_n(first_result, pairs, result);
      std::copy_n(second_result, pairs, result + pairs);
    } else {
      for (std::int64_t i = 0; i < pairs; ++i) result[2 * i] = first_result[i], result[2 * i + 1] = second_result[i];
    }
    Narrow(rotated.dtype, result, head_row(rotated, to, head), dim);
  }
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(RotateToken);

namespace {

constexpr std::int64_t kTokens = RopeTable::kRun;  // of one task

// Rotates tokens [begin, end) of x, the first of which sits at `position`.
void rotate_tokens(const Call& call, const ConstTensor& x, const Tensor& rotated, std::int64_t begin, std::int64_t end,
                   std::int64_t position, const RopeScratch& scratch) {
  const RopeTable& table = *call.plan.rope;
  const auto rotate_token = MOBA_KERNEL(RotateToken, call.plan.cpu_target);
  table.rows(position, end - begin, scratch.cos, scratch.sin);
  for (std::int64_t token = begin; token < end; ++token) {
    const std::int64_t row = (token - begin) * table.pairs();
    rotate_token(x, token, rotated, token,
                 {call.plan.problem.rope->style, table.pairs(), scratch.cos + row, scratch.sin + row});
  }
}

}  // namespace

void rope(const Call& call, const Tensor& q_rotated, const Tensor& k_rotated) {
  const Problem& p = call.plan.problem;
  const std::int64_t q_tasks = ceil_div(p.total_q, kTokens),
                     k_tasks = k_rotated.given() ? ceil_div(p.total_k, kTokens) : 0;
  parallel_for(call.plan.threads, q_tasks + k_tasks, [&](std::int64_t task, int slot) {
    Carver carver(thread_scratch(call, slot));
    const RopeScratch scratch(carver, call.plan);
    if (task < q_tasks) {
      const std::int64_t begin = task * kTokens, end = std::min(p.total_q, begin + kTokens);
      for_each_sequence(call.sequences, begin, end, [&](const Sequence& s, std::int64_t first, std::int64_t last) {
        rotate_tokens(call, call.q, q_rotated, first, last, s.first_position() + first - s.q_begin, scratch);
      });
    } else {
      const std::int64_t begin = (task - q_tasks) * kTokens, end = std::min(p.total_k, begin + kTokens);
      for_each_key_sequence(call.sequences, begin, end, [&](const Sequence& s, std::int64_t first, std::int64_t last) {
        rotate_tokens(call, call.k, k_rotated, first, last, first - s.k_begin, scratch);
      });
    }
  });
}

void turn_back(const Call& call, const ConstTensor& from, const Tensor& to, std::int64_t position, float factor,
               const RopeScratch& scratch) {
  const RopeTable& table = *call.plan.rope;
  const auto rotate_token = MOBA_KERNEL(RotateToken, call.plan.cpu_target);
  for (std::int64_t run = 0; run < from.shape[0]; run += kTokens) {
    const std::int64_t count = std::min(kTokens, from.shape[0] - run), pairs = table.pairs();
    table.rows(position + run, count, scratch.cos, scratch.sin);
    std::transform(scratch.sin, scratch.sin + count * pairs, scratch.sin, [](float sine) { return -sine; });
    for (std::int64_t i = 0; i < count; ++i) {
      const RopeTask task{call.plan.problem.rope->style, pairs, scratch.cos + i * pairs, scratch.sin + i * pairs,
                          factor};
      rotate_token(from, run + i, to, run + i, task);
    }
  }
}

void round_rows(const Call& call, const ConstTensor& from, const Tensor& to, float factor) {
  const auto rotate_token = MOBA_KERNEL(RotateToken, call.plan.cpu_target);
  for (std::int64_t i = 0; i < from.shape[0]; ++i) {
    rotate_token(from, i, to, i, {RopeStyle::half_split, 0, nullptr, nullptr, factor});
  }
}

}  // namespace moba::cpu
#endif
