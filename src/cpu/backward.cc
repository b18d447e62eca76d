// backward: dq, dk and dv, key-major as attend. A task is a chunk of query rows of one key head (the g heads of the
// group packed as rows). It walks the keys in ascending order, tile by tile; the rows of the chunk that chose a tile's
// block meet it in five products, with S and dP of a tile of rows never leaving the cache:
//
//   S = Q K^T    dP = dO V^T    P = exp(scale S - lse)    dS = P (dP - delta)    dV += P^T dO    dK += dS^T Q    dQ +=
//   dS K
//
// delta = dO . out of a row. dq of a row stays in the task. dk and dv of a tile of keys are summed in the task over its
// rows, then added to the sums of the batch when it is the task's turn (turns.h). What a task is does not depend on the
// number of threads, so neither does a bit of the sums.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "call.h"
#include "cpu/lanes-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/product-inl.h"
#include "cpu/rope.h"
#include "cpu/rows_product-inl.h"
#include "cpu/targets.h"
#include "cpu/turns.h"
#include "cpu/workers.h"
#include "parallel.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

constexpr float kLog2E = 1.4426950408889634f;

// to[0..n) += from[0..n), both in whole vectors.
inline void AddRow(const float* HWY_RESTRICT from, std::int64_t n, float* HWY_RESTRICT to) {
  const F32 df;
  for (std::int64_t i = 0; i < n; i += kLanes)
    hn::StoreU(hn::Add(hn::LoadU(df, to + i), hn::LoadU(df, from + i)), df, to + i);
}

// to[0..n) += factor * from[0..n), both in whole vectors.
inline void AddScaled(float factor, const float* HWY_RESTRICT from, std::int64_t n, float* HWY_RESTRICT to) {
  const F32 df;
  const VF f = hn::Set(df, factor);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    hn::StoreU(hn::MulAdd(f, hn::LoadU(df, from + i), hn::LoadU(df, to + i)), df, to + i);
  }
}

// to = a row of `dim` elements widened, zeros up to whole vectors. Returns whether all are finite.
inline bool WidenRow(DType dtype, const std::byte* row, std::int64_t dim, float* to) {
  const F32 df;
  const std::int64_t columns = RoundUp(dim, kLanes);
  std::fill(to + columns - kLanes, to + columns, 0.0f);
  Widen(dtype, row, to, dim);
  VF poison = hn::Zero(df);  // becomes NaN where a value times zero is not zero
  for (std::int64_t i = 0; i < columns; i += kLanes) poison = hn::MulAdd(hn::LoadU(df, to + i), hn::Zero(df), poison);
  return hn::AllFalse(df, hn::IsNaN(poison));
}

inline float DotRows(const float* a, const float* b, std::int64_t n) {
  const F32 df;
  VF sum = hn::Zero(df);
  for (std::int64_t i = 0; i < n; i += kLanes) sum = hn::MulAdd(hn::LoadU(df, a + i), hn::LoadU(df, b + i), sum);
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

// One chunk of rows of one key head at work.
class BackwardChunk {
 public:
  BackwardChunk(const BackwardJob& job, const BackwardPart& part, const Turns& turns, const BackwardScratch& scratch)
      : job_(job),
        call_(job.call),
        turns_(turns),
        s_(scratch),
        kv_head_(part.kv_head),
        group_(call_.plan.group),
        first_row_(part.begin * group_),
        rows_((part.end - part.begin) * group_),
        dim_(call_.plan.problem.head_dim),
        columns_(RoundUp(dim_, kLanes)),
        stride_(odd_lines(dim_)),
        sum_stride_(sum_stride(dim_)),
        scale_(static_cast<float>(call_.plan.scale * 1.4426950408889634)) {
    std::fill_n(s_.dq, rows_ * sum_stride_, 0.0f);
    for (std::int64_t i = 0; i < rows_; ++i) prepare(i);
  }

  // `rows` (ids token * g + head in group, ascending, all of `sequence`) meet keys first .. first + count of it.
  void visit(const Sequence& sequence, std::int64_t first, std::int64_t keys, std::span<const std::int32_t> rows) {
    for (std::int64_t tile = first; tile < first + keys; tile += kKeyTile) {
      const std::int64_t count = std::min(kKeyTile, first + keys - tile);
      const auto blind = std::ranges::partition_point(
          rows, [&](std::int32_t row) { return visible(sequence, row, tile, count) == 0; });
      rows = rows.subspan(static_cast<std::size_t>(blind - rows.begin()));
      if (rows.empty()) return;
      visit_tile(sequence, tile, count, rows);
    }
  }

  // Writes dq of the tokens [first, last) of `sequence`.
  void finish(const Sequence& sequence, std::int64_t first, std::int64_t last) const {
    const ConstTensor from = sums(s_.dq + (first * group_ - first_row_) * sum_stride_, last - first, group_, dim_);
    Tensor to = job_.gradients.dq;
    to.data = head_row(to, first, kv_head_ * group_);
    const float scale = static_cast<float>(call_.plan.scale);
    if (!call_.plan.rope) return round_rows(call_, from, to, scale);
    turn_back(call_, from, to, sequence.first_position() + first - sequence.q_begin, scale, s_.rope);
  }

 private:
  using Seen = std::array<std::int64_t, kRowTile>;

  std::int64_t visible(const Sequence& sequence, std::int64_t row, std::int64_t tile, std::int64_t keys) const {
    const std::int64_t position = sequence.first_position() + row / group_ - sequence.q_begin;
    return visible_keys(position, tile, keys, call_.plan.problem.config.causal);
  }

  const std::byte* row_of(const ConstTensor& tensor, std::int64_t row) const {
    return head_row(tensor, row / group_, kv_head_ * group_ + row % group_);
  }
  bool widen_row(const ConstTensor& tensor, std::int64_t row, float* to) const {
    return WidenRow(tensor.dtype, row_of(tensor, row), dim_, to);
  }
  HeadRows head(const ConstTensor& t) const {
    return {head_row(t, 0, kv_head_), t.stride[0] * static_cast<std::int64_t>(size_in_bytes(t.dtype)), t.dtype, dim_};
  }

  // delta, lse and finiteness of row i of the chunk.
  void prepare(std::int64_t i) {
    const std::int64_t row = first_row_ + i, token = row / group_, head = kv_head_ * group_ + row % group_;
    const ConstTensor& lse = job_.given.lse;
    widen_row(job_.given.out, row, s_.q);
    const bool finite_dout = widen_row(job_.given.dout, row, s_.dout);
    s_.delta[i] = DotRows(s_.dout, s_.q, columns_);
    s_.lse[i] = kLog2E * static_cast<const float*>(lse.data)[head * lse.stride[0] + token * lse.stride[1]];
    s_.finite[i] = widen_row(call_.q, row, s_.q) && finite_dout;
  }

  void visit_tile(const Sequence& sequence, std::int64_t tile, std::int64_t keys, std::span<const std::int32_t> rows) {
    const std::int64_t first = sequence.k_begin + tile;
    const bool finite = pack(first, keys);
    std::fill_n(s_.dk, keys * sum_stride_, 0.0f);
    std::fill_n(s_.dv, keys * sum_stride_, 0.0f);
    while (!rows.empty()) {
      const auto now = rows.first(std::min<std::size_t>(rows.size(), kRowTile));
      rows = rows.subspan(now.size());
      visit_rows(sequence, tile, keys, now, finite);
    }
    turns_.wait(first + keys);
    add(s_.dk, first, keys, job_.sums.dk);
    add(s_.dv, first, keys, job_.sums.dv);
    turns_.pass(first + keys);
  }

  // Keys `first` .. first + keys of the batch, and their values. Returns whether all are finite.
  bool pack(std::int64_t first, std::int64_t keys) {
    PackKeys<false>(head(call_.k), first, keys, s_.keys);
    PackKeys<false>(head(call_.v), first, keys, s_.values);
    bool finite = true;
    for (std::int64_t j = 0; j < keys; ++j) {  // the rows of v pass through a row of k
      float* to = s_.key_rows + j * stride_;
      finite &= WidenRow(call_.v.dtype, head_row(call_.v, first + j, kv_head_), dim_, to);
      finite &= WidenRow(call_.k.dtype, head_row(call_.k, first + j, kv_head_), dim_, to);
    }
    return finite;
  }

  void add(const float* share, std::int64_t first, std::int64_t keys, float* sum) const {
    const std::int64_t heads = call_.plan.problem.kv_heads;
    for (std::int64_t j = 0; j < keys; ++j) {
      AddRow(share + j * sum_stride_, columns_, sum + ((first + j) * heads + kv_head_) * sum_stride_);
    }
  }

  // At most kRowTile rows against the packed tile.
  void visit_rows(const Sequence& sequence, std::int64_t tile, std::int64_t keys, std::span<const std::int32_t> rows,
                  bool finite) {
    const std::int64_t n = std::ssize(rows), most = visible(sequence, rows.back(), tile, keys);
    Seen seen;
    std::array<float*, kRowTile> p, ds, dq;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t row = rows[static_cast<std::size_t>(i)], at = row - first_row_;
      widen_row(call_.q, row, s_.q + i * stride_);
      widen_row(job_.given.dout, row, s_.dout + i * stride_);
      finite &= s_.finite[at] != 0;
      // A row of scores -inf only is as one without keys.
      const bool empty = s_.lse[at] == -std::numeric_limits<float>::infinity();
      seen[i] = empty ? 0 : visible(sequence, row, tile, keys);
      p[i] = s_.p + i * kScoreStride;
      ds[i] = s_.ds + i * kScoreStride;
      dq[i] = s_.dq + at * sum_stride_;
    }
    const std::int64_t packed = RoundUp(keys, kKeyStep);
    Multiply<false>(s_.q, stride_, n, s_.keys, dim_, packed, most, dim_, p.data(), nullptr);
    Multiply<false>(s_.dout, stride_, n, s_.values, dim_, packed, most, dim_, ds.data(), nullptr);
    for (std::int64_t i = 0; i < n; ++i) {
      weights(p[i], ds[i], rows[static_cast<std::size_t>(i)] - first_row_, seen[i], most);
    }
    if (!finite) return add_pairs(rows, seen);

    std::array<float*, kKeyTile> dk, dv;
    for (std::int64_t j = 0; j < most; ++j) {
      dk[j] = s_.dk + j * sum_stride_;
      dv[j] = s_.dv + j * sum_stride_;
    }
    AddProduct<true>({s_.p, kScoreStride, s_.dout, stride_, n}, most, columns_, dv.data());
    AddProduct<true>({s_.ds, kScoreStride, s_.q, stride_, n}, most, columns_, dk.data());
    AddProduct<false>({s_.ds, kScoreStride, s_.key_rows, stride_, most}, n, columns_, dq.data());
  }

  // p = S, ds = dP of row `at` of the chunk become P and dS; both are 0 from `seen` up to `most` keys, and dS where P
  // is, whatever dP and delta are.
  void weights(float* HWY_RESTRICT p, float* HWY_RESTRICT ds, std::int64_t at, std::int64_t seen,
               std::int64_t most) const {
    const F32 df;
    const VF scale = hn::Set(df, scale_), lse = hn::Set(df, s_.lse[at]), delta = hn::Set(df, s_.delta[at]);
    for (std::int64_t j = 0; j < most; j += kLanes) {
      const auto inside = hn::FirstN(df, static_cast<std::size_t>(std::max<std::int64_t>(0, seen - j)));
      const VF weight = Exp2(hn::MulSub(scale, hn::LoadU(df, p + j), lse));
      const VF slope = hn::Mul(weight, hn::Sub(hn::LoadU(df, ds + j), delta));
      const VF taking_part = hn::IfThenZeroElse(hn::Eq(weight, hn::Zero(df)), slope);  // NaN is not 0
      hn::StoreU(hn::IfThenElseZero(inside, weight), df, p + j);
      hn::StoreU(hn::IfThenElseZero(inside, taking_part), df, ds + j);
    }
  }

  // The same sums, to the bit, pair by pair: where anything is not finite, a pair that is masked or has weight 0 must
  // not take part at all: as a zero times an inf or a NaN it would.
  void add_pairs(std::span<const std::int32_t> rows, const Seen& seen) const {
    for (std::int64_t i = 0; i < std::ssize(rows); ++i) {
      const std::int64_t at = rows[static_cast<std::size_t>(i)] - first_row_;
      for (std::int64_t j = 0; j < seen[i]; ++j) {
        const float weight = s_.p[i * kScoreStride + j], slope = s_.ds[i * kScoreStride + j];
        if (weight == 0.0f) continue;
        AddScaled(weight, s_.dout + i * stride_, columns_, s_.dv + j * sum_stride_);
        AddScaled(slope, s_.q + i * stride_, columns_, s_.dk + j * sum_stride_);
        AddScaled(slope, s_.key_rows + j * stride_, columns_, s_.dq + at * sum_stride_);
      }
    }
  }

  static ConstTensor sums(const float* data, std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
    ConstTensor view(data, DType::f32, {tokens, heads, dim});
    view.stride = {heads * sum_stride(dim), sum_stride(dim), 1};
    return view;
  }

  const BackwardJob& job_;
  const Call& call_;
  const Turns& turns_;
  const BackwardScratch& s_;
  const std::int64_t kv_head_, group_, first_row_, rows_, dim_, columns_, stride_, sum_stride_;
  const float scale_;
};

// Every block of `sequence` with the rows of its tokens [first, last) that chose it.
inline void VisitSelected(const BackwardJob& job, const Sequence& sequence, std::int64_t kv_head, std::int64_t first,
                          std::int64_t last, BackwardChunk& chunk) {
  const Plan::Impl& plan = job.call.plan;
  const std::int64_t block_size = plan.problem.config.block_size;
  const std::int64_t* offsets =
      static_cast<const std::int64_t*>(job.selection->offsets.data) + kv_head * plan.max_blocks;
  const std::int32_t* rows = static_cast<const std::int32_t*>(job.selection->rows.data);
  for (std::int64_t block = 0; block < sequence.blocks; ++block) {
    const std::int64_t* range = offsets + sequence.block_begin + block;
    const auto chosen = rows_between({rows + range[0], rows + range[1]}, first * plan.group, last * plan.group);
    const std::int64_t start = block * block_size;
    if (!chosen.empty()) chunk.visit(sequence, start, std::min(block_size, sequence.k_len - start), chosen);
  }
}

void BackwardTask(const BackwardJob& job, const BackwardPart& part, const Turns& turns,
                  const BackwardScratch& scratch) {
  const std::int64_t group = job.call.plan.group;
  BackwardChunk chunk(job, part, turns, scratch);
  for_each_sequence(job.call.sequences, part.begin, part.end,
                    [&](const Sequence& sequence, std::int64_t first, std::int64_t last) {
                      if (job.selection != nullptr) {
                        VisitSelected(job, sequence, part.kv_head, first, last, chunk);
                      } else {
                        const auto rows = static_cast<std::size_t>((last - first) * group);
                        std::iota(scratch.row_ids, scratch.row_ids + rows, static_cast<std::int32_t>(first * group));
                        chunk.visit(sequence, 0, sequence.k_len, {scratch.row_ids, rows});
                      }
                      chunk.finish(sequence, first, last);
                    });
  turns.finish();
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(BackwardTask);

namespace {

constexpr std::int64_t kTokens = RopeTable::kRun;  // of one task at the sums

// Zeros to all sums.
void clear(const Call& call, const BackwardSums& sums, std::int64_t tasks) {
  const Problem& p = call.plan.problem;
  const std::int64_t token = p.kv_heads * sum_stride(p.head_dim);
  std::fill_n(sums.passed, p.kv_heads * tasks, 0);
  parallel_for(call.plan.threads, ceil_div(p.total_k, kTokens), [&](std::int64_t task, int) {
    const std::int64_t begin = task * kTokens, count = std::min(kTokens, p.total_k - begin) * token;
    std::fill_n(sums.dk + begin * token, count, 0.0f);
    std::fill_n(sums.dv + begin * token, count, 0.0f);
  });
}

// The sums as gradients.
void write(const Call& call, const BackwardSums& sums, const Gradients& gradients,
           const std::function<BackwardScratch(int)>& scratch_of) {
  const Problem& p = call.plan.problem;
  const std::int64_t stride = sum_stride(p.head_dim);
  const auto view = [&](const float* sum, std::int64_t first, std::int64_t last) {
    ConstTensor rows(sum + first * p.kv_heads * stride, DType::f32, {last - first, p.kv_heads, p.head_dim});
    rows.stride = {p.kv_heads * stride, stride, 1};
    return rows;
  };
  const auto place = [&](Tensor to, std::int64_t first) {
    to.data = head_row(to, first, 0);
    return to;
  };
  const float scale = static_cast<float>(call.plan.scale);
  parallel_for(call.plan.threads, ceil_div(p.total_k, kTokens), [&](std::int64_t task, int slot) {
    const std::int64_t begin = task * kTokens, end = std::min(p.total_k, begin + kTokens);
    round_rows(call, view(sums.dv, begin, end), place(gradients.dv, begin), 1.0f);
    if (!call.plan.rope) return round_rows(call, view(sums.dk, begin, end), place(gradients.dk, begin), scale);
    const BackwardScratch scratch = scratch_of(slot);
    for_each_key_sequence(call.sequences, begin, end, [&](const Sequence& s, std::int64_t first, std::int64_t last) {
      turn_back(call, view(sums.dk, first, last), place(gradients.dk, first), first - s.k_begin, scale, scratch.rope);
    });
  });
}

// Chunks of `step` tokens.
void backward_chunks(const Call& call, const Selection* selection, const Cotangents& given, const Gradients& gradients,
                     std::int64_t step) {
  const Plan::Impl& plan = call.plan;
  const std::int64_t tokens = plan.problem.total_q, heads = plan.problem.kv_heads, chunks = ceil_div(tokens, step);
  Carver shared(call.scratch.data());
  const BackwardSums sums(shared, plan, chunks);
  Carver measure;
  BackwardScratch(measure, plan, step * plan.group);
  const auto scratch_of = [&](int slot) {
    Carver own(call.scratch.data() + shared.used() + measure.used() * static_cast<std::size_t>(slot));
    return BackwardScratch(own, plan, step * plan.group);
  };
  clear(call, sums, chunks);
  const BackwardJob job{call, selection, given, gradients, sums};
  const auto task = MOBA_KERNEL(BackwardTask, plan.cpu_target);
  // The last chunks first: under a causal mask they are the longest. Neighbours in this order are of different key
  // heads, so that they need not wait for each other.
  parallel_for(plan.threads, chunks * heads, [&](std::int64_t i, int slot) {
    const std::int64_t chunk = chunks - 1 - i / heads, head = i % heads, begin = chunk * step;
    const Turns turns(sums.passed + head * chunks, i / heads);
    task(job, {head, begin, std::min(tokens, begin + step)}, turns, scratch_of(slot));
  });
  write(call, sums, gradients, scratch_of);
}

}  // namespace

void backward(const Call& call, const Selection& selection, const Cotangents& given, const Gradients& gradients) {
  backward_chunks(call, &selection, given, gradients, backward_tokens(call.plan));
}

void dense_backward(const Call& call, const Cotangents& given, const Gradients& gradients) {
  backward_chunks(call, nullptr, given, gradients, dense_tokens(call.plan));
}

}  // namespace moba::cpu
#endif
