// How the cpu backend cuts a batch into tasks and where each thread keeps its scratch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "call.h"
#include "carver.h"
#include "cpu/targets.h"
#include "plan_impl.h"

namespace moba::cpu {

inline std::byte* thread_scratch(const Call& call, int slot) {
  return call.scratch.data() + call.plan.scratch_per_thread * static_cast<std::size_t>(slot);
}

// The sequences that hold tokens of [begin, end), given where a sequence's tokens begin and how many they are:
// f(sequence, first, last) with the tokens of each.
template <class Sequences, class S, class F>
void for_each_overlap(const Sequences& sequences, std::int64_t S::*start, std::int64_t S::*length, std::int64_t begin,
                      std::int64_t end, F&& f) {
  auto s = std::ranges::partition_point(sequences, [&](const S& q) { return q.*start + q.*length <= begin; });
  for (; s != sequences.end() && (*s).*start < end; ++s) {
    const std::int64_t first = std::max(begin, (*s).*start), last = std::min(end, (*s).*start + (*s).*length);
    if (first < last) f(*s, first, last);
  }
}

// The same for query tokens and for key tokens.
template <class F>
void for_each_sequence(std::span<const Sequence> sequences, std::int64_t begin, std::int64_t end, F&& f) {
  for_each_overlap(sequences, &Sequence::q_begin, &Sequence::q_len, begin, end, f);
}
template <class F>
void for_each_key_sequence(std::span<const Sequence> sequences, std::int64_t begin, std::int64_t end, F&& f) {
  for_each_overlap(sequences, &Sequence::k_begin, &Sequence::k_len, begin, end, f);
}

// The rows of `rows` that belong to row ids [begin, end).
inline std::span<const std::int32_t> rows_between(std::span<const std::int32_t> rows, std::int64_t begin,
                                                  std::int64_t end) {
  const auto first = std::ranges::lower_bound(rows, begin), last = std::ranges::lower_bound(first, rows.end(), end);
  return {first, last};
}

// Row i (token) of head h of a [tokens, heads, d] tensor, in bytes.
inline const std::byte* head_row(const ConstTensor& tensor, std::int64_t token, std::int64_t head) {
  return static_cast<const std::byte*>(tensor.data) +
         (token * tensor.stride[0] + head * tensor.stride[1]) * static_cast<std::int64_t>(size_in_bytes(tensor.dtype));
}
inline std::byte* head_row(const Tensor& tensor, std::int64_t token, std::int64_t head) {
  return const_cast<std::byte*>(head_row(ConstTensor(tensor), token, head));
}

// ---- Scratch of the steps, per thread. ----

inline constexpr std::int64_t kKeyTile = 128;   // keys of one score tile
inline constexpr std::int64_t kRowTile = 48;    // query rows of one score tile: a multiple of the product's 6
inline constexpr std::int64_t kGateTile = 256;  // blocks scored at a time

// attend and dense: `rows` query rows with their running output, maximum and sum, and one tile of everything else.
struct AttendScratch {
  float *out, *maximum, *sum;  // [rows][RoundUp(d)], [rows], [rows]
  std::int32_t* row_ids;       // [rows], dense only
  float *keys, *values;        // packed: [d][kKeyTile], [kKeyTile][RoundUp(d)]
  float *q, *scores, *pairs;   // [kRowTile][RoundUp(d)], [kRowTile][kKeyTile], the same as bfloat16 pairs

  AttendScratch(Carver& carver, std::int64_t rows, std::int64_t head_dim);
};

// gate: the packed centroids of one sequence and one tile of rows.
struct GateScratch {
  float* centroids;     // packed: [d][blocks]
  float* q;             // [kRowTile][d]
  float* scores;        // [kRowTile][kGateTile]
  std::int64_t* best;   // [kRowTile][slots]
  std::int64_t* spare;  // [2][kGateTile + slots]

  GateScratch(Carver& carver, const Plan::Impl& plan);
};

// rope: the table rows of one run of tokens, and what rotating a token takes. Null without a rope.
struct RopeScratch {
  float *cos, *sin;  // [RopeTable::kRun][pairs], and a vector to read beyond the end

  RopeScratch(Carver& carver, const Plan::Impl& plan);
};
struct RopeTask {
  RopeStyle style;
  std::int64_t pairs;
  const float *cos, *sin;  // [pairs]
  float factor = 1.0f;     // on the elements, before they are rotated
};

inline constexpr std::int64_t kScoreStride = kKeyTile + 16;  // see odd_lines
// Floats of a row that begins every odd number of cache lines: columns of such rows do not fall into few sets of L1.
constexpr std::int64_t odd_lines(std::int64_t n) { return (ceil_div(n, kMaxLanes) | 1) * kMaxLanes; }
// Floats of a row of sums, whole vectors.
constexpr std::int64_t sum_stride(std::int64_t head_dim) { return ceil_div(head_dim, kMaxLanes) * kMaxLanes; }

// backward, shared by all threads: float32 sums of dk and dv, and whose turn it is to add to them.
struct BackwardSums {
  float *dk, *dv;        // [Tk][Hk][sum_stride(d)]
  std::int64_t* passed;  // [Hk][tasks of a key head], turns.h

  BackwardSums(Carver& carver, const Plan::Impl& plan, std::int64_t tasks);
};

// backward, per thread: `rows` query rows with their dq, and one tile of everything else.
struct BackwardScratch {
  float* dq;              // [rows][sum_stride(d)]
  float *delta, *lse;     // [rows]: dout . out; log2(e) lse
  std::int32_t* finite;   // [rows]: whether all of q and dout is
  std::int32_t* row_ids;  // [rows], dense_backward only
  float *keys, *values;   // packed: [d][kKeyTile]
  float* key_rows;        // [kKeyTile][odd_lines(d)]
  float *q, *dout;        // [kRowTile][odd_lines(d)]
  float *p, *ds;          // [kRowTile][kScoreStride]
  float *dk, *dv;         // [kKeyTile][sum_stride(d)]
  RopeScratch rope;

  BackwardScratch(Carver& carver, const Plan::Impl& plan, std::int64_t rows);
};

// One call of backward, or without a selection of dense_backward; and what of it is one task: tokens [begin, end) of a
// key head.
struct BackwardJob {
  const Call& call;
  const Selection* selection;
  const Cotangents& given;
  const Gradients& gradients;
  const BackwardSums& sums;
};
struct BackwardPart {
  std::int64_t kv_head, begin, end;
};

// index: chunks of tokens that are counted apart, each with a counter per (key head, block).
inline std::int64_t index_chunks(const Plan::Impl& plan) {
  return std::clamp<std::int64_t>(ceil_div(plan.problem.total_q, 256), 1, std::min(64, 4 * plan.threads));
}

// Query tokens of one gate task: about 1024 rows, against which packing the centroids weighs little.
inline std::int64_t gate_tokens(const Plan::Impl& plan) { return std::max<std::int64_t>(1, 1024 / plan.group); }

// The same of attend and dense.
inline std::int64_t attend_tokens(const Plan::Impl& plan) {
  return std::max<std::int64_t>(1, plan.attend_rows / plan.group);
}
inline std::int64_t dense_tokens(const Plan::Impl& plan) {
  return std::max<std::int64_t>(1, plan.dense_rows / plan.group);
}

// The same of backward; it does not depend on the number of threads, because dk and dv are added up task by task.
inline std::int64_t backward_tokens(const Plan::Impl& plan) {
  return std::max<std::int64_t>(1, plan.backward_rows / plan.group);
}

// Rows of one attend task.
std::int64_t attend_rows(const Plan::Impl& plan);

// The centroid of keys begin .. begin + keys of one head of k [tokens, Hk, d], in pages or not. pool.cc
void pool_block(const Plan::Impl& plan, const ConstTensor& k, const KeyPages& pages, std::int64_t head,
                std::int64_t begin, std::int64_t keys, std::byte* centroid);

// Fills in the cpu part of a plan: target, kernels, task sizes, scratch.
void prepare(Plan::Impl& plan);

}  // namespace moba::cpu
