// attend: key-major flash attention. A task is a chunk of query rows of one key head (the g heads of the group packed
// as rows). It walks the blocks of each sequence in ascending order; the rows of the chunk that chose a block are
// gathered, meet its keys and values, packed once for all of them, in tiles, and add to their running output: the merge
// by log-sum-exp happens there, in the order of the blocks, so that no partial result is ever written out. (Partials of
// every (row, block) would move 2 d floats a pair through memory, as long as the arithmetic takes: at 32K tokens, B =
// 128, k = 8 that is 134 MB each way for a head of 128, against 16 MB of running outputs.)
//
// A row's result is one chain of operations whatever rows stand beside it, so the cut into chunks and threads is free.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "call.h"
#include "cpu/bf16_dot.h"
#include "cpu/lanes-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/product-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/targets.h"
#include "cpu/workers.h"
#include "parallel.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

// Keys of a sequence: first .. first + count.
struct Keys {
  std::int64_t first = 0, count = 0;
};

// One chunk of rows of one key head at work.
template <bool kPairs>
class Chunk {
 public:
  Chunk(const Call& call, std::int64_t kv_head, std::int64_t first_token, std::int64_t tokens,
        const AttendScratch& scratch)
      : call_(call),
        kv_head_(kv_head),
        group_(call.plan.group),
        first_row_(first_token * group_),
        rows_(tokens * group_),
        dim_(call.plan.problem.head_dim),
        columns_(RoundUp(dim_, kLanes)),
        words_(kPairs ? (dim_ + 1) / 2 : dim_),
        scale_(static_cast<float>(call.plan.scale * 1.4426950408889634)),
        s_(scratch) {
    std::fill_n(s_.out, rows_ * columns_, 0.0f);
    std::fill_n(s_.maximum, rows_, kMinusInf);
    std::fill_n(s_.sum, rows_, 0.0f);
  }

  // Attends `rows` (ids token * g + head in group, ascending, all of `sequence`) to some keys of it. `next` are the
  // keys of the following call, if there are any.
  void attend(const Sequence& sequence, const Keys& keys, std::span<const std::int32_t> rows, const Keys& next) {
    for (std::int64_t tile = keys.first; tile < keys.first + keys.count; tile += kKeyTile) {
      const std::int64_t count = std::min(kKeyTile, keys.first + keys.count - tile);
      const auto blind = std::ranges::partition_point(
          rows, [&](std::int32_t row) { return visible(sequence, row, tile, count) == 0; });
      rows = rows.subspan(static_cast<std::size_t>(blind - rows.begin()));
      if (rows.empty()) return;
      const std::int64_t left = keys.first + keys.count - (tile + count);
      coming_ =
          left > 0 ? Keys{tile + count, std::min(kKeyTile, left)} : Keys{next.first, std::min(kKeyTile, next.count)};
      attend_tile(sequence, {tile, count}, rows);
    }
  }

  // Divides by the sums and writes the rows out.
  void finish(const Outputs& outputs) {
    for (std::int64_t i = 0; i < rows_; ++i) {
      const std::int64_t token = (first_row_ + i) / group_, head = kv_head_ * group_ + (first_row_ + i) % group_;
      const float sum = s_.sum[i];
      float* row = s_.out + i * columns_;
      if (sum == 0.0f) std::fill_n(row, columns_, 0.0f);
      const VF factor = hn::Set(F32(), sum == 0.0f ? 0.0f : 1.0f / sum);
      for (std::int64_t j = 0; j < columns_; j += kLanes) {
        // Adding zero turns -0 into +0: whether masked keys were multiplied in as zeros leaves no trace.
        hn::StoreU(hn::MulAdd(hn::LoadU(F32(), row + j), factor, hn::Zero(F32())), F32(), row + j);
      }
      Narrow(outputs.out.dtype, row, head_row(outputs.out, token, head), dim_);
      if (outputs.lse.given()) {
        const float lse = sum == 0.0f ? kMinusInf : s_.maximum[i] * 0.6931471805599453f + std::log(sum);
        static_cast<float*>(outputs.lse.data)[head * outputs.lse.stride[0] + token * outputs.lse.stride[1]] = lse;
      }
    }
  }

 private:
  std::int64_t visible(const Sequence& sequence, std::int64_t row, std::int64_t tile, std::int64_t keys) const {
    const std::int64_t position = sequence.first_position() + row / group_ - sequence.q_begin;
    return visible_keys(position, tile, keys, call_.plan.problem.config.causal);
  }

  void attend_tile(const Sequence& sequence, const Keys& tile, std::span<const std::int32_t> rows) {
    PackKeys<kPairs>(keys(), sequence.k_begin + tile.first, tile.count, s_.keys);
    const bool finite = pack_values(sequence, tile);
    coming_row_ = 0;
    rows_per_tile_ = ceil_div(2 * coming_.count, ceil_div(std::ssize(rows), kRowTile));
    std::array<std::int64_t, kRowTile> seen;
    while (!rows.empty()) {
      std::size_t n = 0;
      while (n < std::min<std::size_t>(rows.size(), kRowTile)) {
        seen[n] = visible(sequence, rows[n], tile.first, tile.count);
        // A masked key counts as probability zero; times an inf or a NaN that would not be zero. So rows that see
        // different keys part ways here.
        if (!finite && seen[n] != seen[0]) break;
        ++n;
      }
      // For the same reason a pair must not join a value that is seen with one that is masked.
      if (kPairs && !finite) pack_values(sequence, {tile.first, seen[0]});
      const auto now = rows.first(n);
      rows = rows.subspan(n);
      attend_rows(sequence, now, seen, tile.count, rows.first(std::min<std::size_t>(rows.size(), kRowTile)));
    }
  }

  // Whether all are finite.
  bool pack_values(const Sequence& sequence, const Keys& keys) {
    values_ = keys.count;
    if constexpr (kPairs) {
      return PackValuePairs(values(), sequence.k_begin + keys.first, keys.count, s_.values);
    } else {
      return PackValues(values(), sequence.k_begin + keys.first, keys.count, s_.values);
    }
  }

  HeadRows keys() const { return HeadOf(call_.k, kv_head_, call_.k_pages); }
  HeadRows values() const { return HeadOf(call_.v, kv_head_, call_.v_pages); }

  // One tile: at most kRowTile rows against the packed keys and values; row i sees the first seen[i] of them
  // (ascending). `following` is the next tile.
  void attend_rows(const Sequence& sequence, std::span<const std::int32_t> rows,
                   const std::array<std::int64_t, kRowTile>& seen, std::int64_t keys,
                   std::span<const std::int32_t> following) {
    const std::int64_t n = std::ssize(rows), most = seen[rows.size() - 1];
    std::array<float*, kRowTile> scores, out;
    for (std::int64_t i = 0; i < n; ++i) {
      gather(rows[static_cast<std::size_t>(i)], s_.q + i * words_);
      scores[i] = s_.scores + i * kKeyTile;
      out[i] = s_.out + local(rows[i]) * columns_;
    }
    std::array<NextRow, kRowTile + 2 * kKeyTile> soon;
    const std::int64_t packed = RoundUp(keys, kKeyStep);
    multiply<false>(s_.q, words_, n, s_.keys, words_, packed, most, words_, scores.data(), nullptr,
                    NextRows(outputs_and_keys(sequence, std::span(out).first(rows.size()), soon)));
    alignas(64) std::array<float, kRowTile> alpha;
    softmax(rows, seen, most, alpha);
    const float* p = kPairs ? s_.pairs : s_.scores;
    const std::int64_t p_stride = kPairs ? kKeyTile / 2 : kKeyTile;
    const std::int64_t depth = kPairs ? (most + 1) / 2 : most, packed_depth = kPairs ? (values_ + 1) / 2 : values_;
    const auto q_bytes = dim_ * static_cast<std::int64_t>(size_in_bytes(call_.q.dtype));
    std::ranges::transform(following, soon.begin(), [&](std::int32_t row) { return NextRow{q_row(row), q_bytes}; });
    multiply<true>(p, p_stride, n, s_.values, packed_depth, columns_, columns_, depth, out.data(), alpha.data(),
                   NextRows(std::span(soon).first(following.size())));
  }

  // What a tile needs after its scores: the outputs of its rows; and its share of the keys and values that are packed
  // next.
  std::span<const NextRow> outputs_and_keys(const Sequence& sequence, std::span<float* const> out,
                                            std::span<NextRow> soon) {
    std::size_t n = 0;
    for (const float* row : out) soon[n++] = {row, columns_ * 4};
    const auto bytes = dim_ * static_cast<std::int64_t>(size_in_bytes(call_.k.dtype));
    const std::int64_t end = std::min(2 * coming_.count, coming_row_ + rows_per_tile_);
    for (; coming_row_ < end; ++coming_row_) {
      const HeadRows from = coming_row_ % 2 == 0 ? keys() : values();
      soon[n++] = {from.row(sequence.k_begin + coming_.first + coming_row_ / 2), bytes};
    }
    return soon.first(n);
  }

  template <bool kAccumulate>
  static void multiply(const float* a, std::int64_t lda, std::int64_t rows, const float* b, std::int64_t b_depth,
                       std::int64_t columns, std::int64_t limit, std::int64_t depth, float* const* c,
                       const float* alpha, NextRows next) {
    if constexpr (kPairs) {
      multiply_pairs(kAccumulate, a, lda, rows, b, b_depth, columns, limit, depth, c, alpha, next);
    } else {
      Multiply<kAccumulate>(a, lda, rows, b, b_depth, columns, limit, depth, c, alpha, next);
    }
  }

  std::int64_t local(std::int32_t row) const { return row - first_row_; }

  const std::byte* q_row(std::int64_t row) const {
    return head_row(call_.q, row / group_, kv_head_ * group_ + row % group_);
  }

  void gather(std::int64_t row, float* to) const {
    const std::byte* from = q_row(row);
    if constexpr (kPairs) {
      CopyPairs(from, dim_, to);
    } else {
      Widen(call_.q.dtype, from, to, dim_);
    }
  }

  // Scores to probabilities: 2^(scale log2(e) s - maximum), with the running maxima and sums brought up to date and the
  // factors alpha for what the rows have summed before. Columns from seen[i] up to `most` become 0.
  void softmax(std::span<const std::int32_t> rows, const std::array<std::int64_t, kRowTile>& seen, std::int64_t most,
               std::array<float, kRowTile>& alpha) {
    const F32 df;
    const std::size_t n = rows.size();
    alignas(64) std::array<float, kRowTile> before{}, now{};
    for (std::size_t i = 0; i < n; ++i) {
      before[i] = s_.maximum[local(rows[i])];
      now[i] = ScaleAndMax(s_.scores + static_cast<std::int64_t>(i) * kKeyTile, seen[i], scale_, before[i]);
      s_.maximum[local(rows[i])] = now[i];
    }
    for (std::size_t i = 0; i < kRowTile; i += kLanes) {
      const VF maximum = hn::Load(df, now.data() + i);
      // A row that has met nothing but -inf keeps the maximum -inf; subtract 0 there, so that it sums to 0.
      const VF reference = hn::IfThenZeroElse(hn::Eq(maximum, hn::Set(df, kMinusInf)), maximum);
      hn::Store(reference, df, now.data() + i);
      hn::Store(Exp2(hn::Sub(hn::Load(df, before.data() + i), reference)), df, alpha.data() + i);
    }
    for (std::size_t i = 0; i < n; ++i) {
      float* row = s_.scores + static_cast<std::int64_t>(i) * kKeyTile;
      float& sum = s_.sum[local(rows[i])];
      sum = sum * alpha[i] + Exponentials(row, seen[i], most, now[i]);
      if constexpr (kPairs) to_pairs(row, most, s_.pairs + static_cast<std::int64_t>(i) * kKeyTile / 2);
    }
  }

  // to = row[0..most) rounded to bfloat16, two to a word; the vector that `most` ends in is zero past seen already.
  static void to_pairs(const float* row, std::int64_t most, float* to) {
#if MOBA_IS_AVX512(HWY_TARGET)
    const F32 df;
    const U32 du;
    for (std::int64_t j = 0; j < most; j += 2 * kLanes) {
      const auto lower = RoundToBf16(hn::LoadU(df, row + j));
      const auto upper = j + kLanes < most ? RoundToBf16(hn::LoadU(df, row + j + kLanes)) : hn::Zero(du);
      const auto even = hn::ShiftRight<16>(hn::ConcatEven(du, upper, lower));
      const auto odd = hn::And(hn::ConcatOdd(du, upper, lower), hn::Set(du, 0xffff0000u));
      hn::StoreU(hn::BitCast(df, hn::Or(even, odd)), df, to + j / 2);
    }
#else
    (void)row, (void)most, (void)to;
#endif
  }

  const Call& call_;
  const std::int64_t kv_head_, group_, first_row_, rows_, dim_, columns_, words_;
  const float scale_;
  const AttendScratch& s_;
  std::int64_t values_ = 0;  // keys whose values are packed

  // The keys that are packed next, of the same sequence: how many rows of k and v, taken in turn, are asked for
  // already, and how many each tile of rows asks for.
  Keys coming_;
  std::int64_t coming_row_ = 0, rows_per_tile_ = 0;
};

template <bool kPairs>
void attend_selected(const Call& call, const Selection& selection, const Outputs& outputs, std::int64_t kv_head,
                     std::int64_t begin, std::int64_t end, const AttendScratch& scratch) {
  const std::int64_t group = call.plan.group, block_size = call.plan.problem.config.block_size;
  Chunk<kPairs> chunk(call, kv_head, begin, end - begin, scratch);
  const std::int64_t* offsets =
      static_cast<const std::int64_t*>(selection.offsets.data) + kv_head * call.plan.max_blocks;
  const std::int32_t* rows = static_cast<const std::int32_t*>(selection.rows.data);
  for_each_sequence(call.sequences, begin, end, [&](const Sequence& sequence, std::int64_t first, std::int64_t last) {
    Keys waiting;  // chosen, but not attended to before the next is known
    std::span<const std::int32_t> waiting_rows;
    for (std::int64_t block = 0; block < sequence.blocks; ++block) {
      const std::int64_t* range = offsets + sequence.block_begin + block;
      const auto chosen = rows_between({rows + range[0], rows + range[1]}, first * group, last * group);
      if (chosen.empty()) continue;
      const std::int64_t start = block * block_size;
      const Keys keys{start, std::min(block_size, sequence.k_len - start)};
      chunk.attend(sequence, waiting, waiting_rows, keys);
      waiting = keys;
      waiting_rows = chosen;
    }
    chunk.attend(sequence, waiting, waiting_rows, {});
  });
  chunk.finish(outputs);
}

template <bool kPairs>
void attend_all(const Call& call, const Outputs& outputs, std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                const AttendScratch& scratch) {
  const std::int64_t group = call.plan.group;
  Chunk<kPairs> chunk(call, kv_head, begin, end - begin, scratch);
  std::iota(scratch.row_ids, scratch.row_ids + (end - begin) * group, static_cast<std::int32_t>(begin * group));
  for_each_sequence(call.sequences, begin, end, [&](const Sequence& sequence, std::int64_t first, std::int64_t last) {
    const std::span<const std::int32_t> rows(scratch.row_ids + (first - begin) * group,
                                             scratch.row_ids + (last - begin) * group);
    chunk.attend(sequence, {0, sequence.k_len}, rows, {});
  });
  chunk.finish(outputs);
}

// Without a selection every row meets every key it may see.
void AttendTask(const Call& call, const Selection* selection, const Outputs& outputs, std::int64_t kv_head,
                std::int64_t begin, std::int64_t end, const AttendScratch& scratch) {
#if MOBA_IS_AVX512(HWY_TARGET)
  if (call.plan.bf16_dot) {
    return selection != nullptr ? attend_selected<true>(call, *selection, outputs, kv_head, begin, end, scratch)
                                : attend_all<true>(call, outputs, kv_head, begin, end, scratch);
  }
#endif
  return selection != nullptr ? attend_selected<false>(call, *selection, outputs, kv_head, begin, end, scratch)
                              : attend_all<false>(call, outputs, kv_head, begin, end, scratch);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(AttendTask);

namespace {

void attend_chunks(const Call& call, const Selection* selection, const Outputs& outputs, std::int64_t step) {
  const std::int64_t tokens = call.plan.problem.total_q, heads = call.plan.problem.kv_heads;
  const std::int64_t chunks = ceil_div(tokens, step);
  const auto task = MOBA_KERNEL(AttendTask, call.plan.cpu_target);
  // The last chunks first: under a causal mask they are the longest.
  parallel_for(call.plan.threads, chunks * heads, [&](std::int64_t i, int slot) {
    const std::int64_t begin = (chunks - 1 - i / heads) * step;
    Carver carver(thread_scratch(call, slot));
    const AttendScratch scratch(carver, step * call.plan.group, call.plan.problem.head_dim);
    task(call, selection, outputs, i % heads, begin, std::min(tokens, begin + step), scratch);
  });
}

}  // namespace

void attend(const Call& call, const Selection& selection, const Outputs& outputs) {
  attend_chunks(call, &selection, outputs, attend_tokens(call.plan));
}

void dense(const Call& call, const Outputs& outputs) { attend_chunks(call, nullptr, outputs, dense_tokens(call.plan)); }

}  // namespace moba::cpu
#endif
