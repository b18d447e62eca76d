// decode: new queries over a cache. What the two ways are, and when each is taken, is in cache.h; here is the one of
// few rows. It has two parallel parts, the gate and attend; whoever does the last task of a key head of a sequence goes
// on to choose its blocks, or to merge its partial results. Rows of a key head meet a block together, one read of it.
//
// A score is the same chain of multiply-adds as in gate.cc, so that a token chooses the same blocks as in a prefill.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/best_blocks-inl.h"
#include "cpu/cache.h"
#include "cpu/lanes-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/product-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/split_call.h"
#include "cpu/targets.h"
#include "parallel.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

// to[0..count) = query rows `row` and on of the group, widened, zero from d up to `dim`.
template <class RowOf>
void GatherQueries(const SplitCall& split, const SplitGroup& group, std::int64_t count, RowOf row_of, float* to) {
  const std::int64_t d = split.q.shape[2], g = split.plan.group, dim = split.sizes.dim;
  for (std::int64_t i = 0; i < count; ++i, to += dim) {
    const std::int64_t row = row_of(i);
    std::fill(to + d, to + dim, 0.0f);
    Widen(split.q.dtype, head_row(split.q, group.sequence->q_begin + row / g, group.head * g + row % g), to, d);
  }
}

// Scores of all the group's rows with the blocks of one tile.
void ScoreTask(const SplitCall& split, const SplitGroup& group, std::int64_t tile, const SplitScratch& scratch) {
  const std::int64_t d = split.q.shape[2], first = tile * kScoreTile;
  const std::int64_t blocks = std::min(kScoreTile, split.candidates(group, split.rows(group) - 1) - first);
  const ConstTensor centroids = at_row(ConstTensor(split.call.centroids), group.sequence->row);
  PackKeys<false>(HeadOf(centroids, group.head), first, blocks, scratch.centroids);
  for (std::int64_t begin = 0; begin < split.rows(group); begin += kRowTile) {
    const std::int64_t count = std::min(kRowTile, split.rows(group) - begin);
    GatherQueries(
        split, group, count, [&](std::int64_t i) { return begin + i; }, scratch.q);
    std::array<float*, kRowTile> scores;
    for (std::int64_t i = 0; i < count; ++i) {
      scores[static_cast<std::size_t>(i)] = split.memory.scores + (group.row + begin + i) * split.sizes.columns + first;
    }
    Multiply<false>(scratch.q, split.sizes.dim, count, scratch.centroids, d, RoundUp(blocks, kKeyStep), blocks, d,
                    scores.data(), nullptr);
  }
}

// The ids of one row, ascending; returns how many.
std::int64_t ChooseRow(const SplitCall& split, const SplitGroup& group, std::int64_t row, const SplitScratch& scratch,
                       std::int32_t* ids) {
  const std::int64_t blocks = split.candidates(group, row);
  std::int64_t count = 0;
  if (split.must_choose(blocks)) {
    BestBlocks best(scratch.best, split.wanted);
    float* scores = split.memory.scores + (group.row + row) * split.sizes.columns;
    for (std::int64_t first = (blocks - 1) / kGateTile * kGateTile; first >= 0; first -= kGateTile) {
      best.offer(scores + first, first, std::min(kGateTile, blocks - first), scratch.spare);
    }
    count = best.blocks(ids);
  } else if (split.wanted > 0) {
    count = blocks;
    std::iota(ids, ids + count, 0);
  }
  ids[count++] = static_cast<std::int32_t>(blocks);  // its own
  return count;
}

void ChooseTask(const SplitCall& split, SplitGroup& group, std::int64_t number, const SplitScratch& scratch) {
  const std::int64_t slots = split.plan.slots;
  Choice* const choices = split.memory.choices + group.choice;
  Choice* end = choices;
  for (std::int64_t row = 0; row < split.rows(group); ++row) {
    std::int32_t* ids = split.memory.ids + (group.row + row) * slots;
    const std::int64_t count = ChooseRow(split, group, row, scratch, ids);
    split.memory.counts[group.row + row] = static_cast<std::int32_t>(count);
    split.write_ids(group, row, {ids, static_cast<std::size_t>(count)});
    for (std::int64_t slot = 0; slot < count; ++slot) {
      *end++ = {ids[slot], static_cast<std::int32_t>(row), static_cast<std::int32_t>(slot)};
    }
  }
  std::sort(choices, end,
            [](const Choice& a, const Choice& b) { return a.block != b.block ? a.block < b.block : a.row < b.row; });
  std::int32_t* starts = split.block_starts(group, number);
  group.blocks = 0;
  for (const Choice* c = choices; c != end; ++c) {
    if (c == choices || c->block != c[-1].block) starts[group.blocks++] = static_cast<std::int32_t>(c - choices);
  }
  starts[group.blocks] = static_cast<std::int32_t>(end - choices);
}

// rows[0..count) = keys first .. first + count, where they lie if they are whole vectors of floats, else widened into
// `buffer`, [count][dim], zero from d on.
inline void KeyRows(const HeadRows& from, std::int64_t first, std::int64_t count, std::int64_t dim, float* buffer,
                    const float** rows) {
  const bool in_place = from.dtype == DType::f32 && from.dim == dim;
  for (std::int64_t j = 0; j < count;) {
    const std::byte* row = from.row(first + j);
    const std::int64_t end = std::min(count, j + from.pages.size - (first + j) % from.pages.size);
    for (; j < end; ++j, row += from.stride) {
      if (in_place) {
        rows[j] = reinterpret_cast<const float*>(row);
        continue;
      }
      rows[j] = buffer + j * dim;
      std::fill(buffer + j * dim + from.dim, buffer + (j + 1) * dim, 0.0f);
      Widen(from.dtype, row, buffer + j * dim, from.dim);
    }
  }
}

constexpr std::int64_t kRowsAtOnce = 4, kKeysAtOnce = kPanelVectors == 4 ? 4 : 2;

// scores[r][j] = q[r] . keys[j] for R rows.
template <int R>
void ScoreKeys(const float* q, const float* const* keys, std::int64_t count, std::int64_t dim, float* scores) {
  const F32 df;
  for (std::int64_t j = 0; j < count; j += kKeysAtOnce) {
    const float* key[kKeysAtOnce];
    VF sum[R][kKeysAtOnce];
    for (std::int64_t c = 0; c < kKeysAtOnce; ++c) {
      key[c] = keys[std::min(j + c, count - 1)];
      for (int r = 0; r < R; ++r) sum[r][c] = hn::Zero(df);
    }
    for (std::int64_t i = 0; i < dim; i += kLanes) {
      VF k[kKeysAtOnce];
#pragma GCC unroll 4
      for (std::int64_t c = 0; c < kKeysAtOnce; ++c) k[c] = hn::LoadU(df, key[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const VF query = hn::LoadU(df, q + r * dim + i);
#pragma GCC unroll 4
        for (std::int64_t c = 0; c < kKeysAtOnce; ++c) sum[r][c] = hn::MulAdd(query, k[c], sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (std::int64_t c = 0; c < std::min(kKeysAtOnce, count - j); ++c) {
        scores[r * kKeyTile + j + c] = hn::GetLane(hn::SumOfLanes(df, sum[r][c]));
      }
    }
  }
}

// out[column ..] = alpha out + sum of p[j] values[j], NV vectors of it.
template <int NV>
void AddValues(const float* p, const float* const* values, std::int64_t count, std::int64_t column, float alpha,
               float* out) {
  const F32 df;
  VF sum[NV];
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) sum[i] = hn::Mul(hn::Set(df, alpha), hn::LoadU(df, out + column + i * kLanes));
  for (std::int64_t j = 0; j < count; ++j) {
    const VF weight = hn::Set(df, p[j]);
    const float* value = values[j] + column;
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) sum[i] = hn::MulAdd(weight, hn::LoadU(df, value + i * kLanes), sum[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) hn::StoreU(sum[i], df, out + column + i * kLanes);
}

inline void AddValues(const float* p, const float* const* values, std::int64_t count, std::int64_t dim, float alpha,
                      float* out) {
  constexpr int kMost = kPanelVectors == 4 ? 8 : 4;
  std::int64_t column = 0;
  for (; column + kMost * kLanes <= dim; column += kMost * kLanes) {
    AddValues<kMost>(p, values, count, column, alpha, out);
  }
  for (; column + 2 * kLanes <= dim; column += 2 * kLanes) AddValues<2>(p, values, count, column, alpha, out);
  if (column < dim) AddValues<1>(p, values, count, column, alpha, out);
}

// Some rows that chose a block, over one tile of its keys: row i sees the first seen[i], ascending.
class TileRows {
 public:
  TileRows(const SplitCall& split, const SplitGroup& group, std::int64_t piece, const SplitScratch& scratch)
      : split_(split), group_(group), piece_(piece), s_(scratch) {}

  void attend(std::span<const Choice> rows, std::span<const std::int64_t> seen, const float* const* keys,
              const float* const* values, bool first_tile) {
    const std::int64_t n = std::ssize(rows), dim = split_.sizes.dim;
    GatherQueries(
        split_, group_, n, [&](std::int64_t i) { return rows[static_cast<std::size_t>(i)].row; }, s_.q);
    for (std::int64_t i = 0; i < n; i += kRowsAtOnce) {
      const std::int64_t count = std::min(kRowsAtOnce, n - i), most = seen[static_cast<std::size_t>(i + count - 1)];
      const float* q = s_.q + i * dim;
      float* scores = s_.scores + i * kKeyTile;
      switch (count) {
        case 1:
          ScoreKeys<1>(q, keys, most, dim, scores);
          break;
        case 2:
          ScoreKeys<2>(q, keys, most, dim, scores);
          break;
        case 3:
          ScoreKeys<3>(q, keys, most, dim, scores);
          break;
        default:
          ScoreKeys<4>(q, keys, most, dim, scores);
          break;
      }
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(i);
      add(rows[at], seen[at], s_.scores + i * kKeyTile, values, first_tile);
    }
  }

 private:
  // Online softmax of one row, as in attend.cc.
  void add(const Choice& row, std::int64_t seen, float* scores, const float* const* values, bool first_tile) {
    if (seen == 0) return;
    const std::int64_t partial = split_.partial(group_, row.row, row.slot, piece_), dim = split_.sizes.dim;
    float &maximum = split_.memory.maximum[partial], &sum = split_.memory.sum[partial];
    float* out = split_.memory.out + partial * dim;
    if (first_tile) {
      maximum = kMinusInf;
      sum = 0.0f;
      std::fill_n(out, dim, 0.0f);
    }
    const float before = maximum;
    maximum = ScaleAndMax(scores, seen, split_.scale, before);
    const float reference = maximum == kMinusInf ? 0.0f : maximum;
    const float alpha = hn::GetLane(Exp2(hn::Set(F32(), before - reference)));
    sum = sum * alpha + Exponentials(scores, seen, seen, reference);
    AddValues(scores, values, seen, dim, alpha, out);
  }

  const SplitCall& split_;
  const SplitGroup& group_;
  const std::int64_t piece_;
  const SplitScratch& s_;
};

// Every row that chose a block, over one piece of its keys.
void PieceTask(const SplitCall& split, const SplitGroup& group, std::int64_t number, std::int64_t task,
               const SplitScratch& scratch) {
  const std::int64_t pieces = split.sizes.pieces, piece = task % pieces;
  const std::int32_t* starts = split.block_starts(group, number) + task / pieces;
  const std::span<const Choice> rows(split.memory.choices + group.choice + starts[0],
                                     static_cast<std::size_t>(starts[1] - starts[0]));
  const CachedSequence& s = *group.sequence;
  const std::int64_t block_size = split.plan.problem.config.block_size, block = rows[0].block;
  const std::int64_t begin = block * block_size + piece * kPieceKeys;
  const std::int64_t end = std::min({(block + 1) * block_size, begin + kPieceKeys, s.length});
  const HeadRows keys = HeadOf(at_row(ConstTensor(split.call.k), 0), group.head,
                               {s.pages, split.call.k.shape[1], split.call.k.stride[0]});
  const HeadRows values = HeadOf(at_row(ConstTensor(split.call.v), 0), group.head,
                                 {s.pages, split.call.v.shape[1], split.call.v.stride[0]});
  TileRows tile_rows(split, group, piece, scratch);
  for (std::int64_t tile = begin; tile < end; tile += kKeyTile) {
    const std::int64_t count = std::min(kKeyTile, end - tile);
    std::array<const float*, kKeyTile> key, value;
    KeyRows(keys, tile, count, split.sizes.dim, scratch.keys, key.data());
    KeyRows(values, tile, count, split.sizes.dim, scratch.values, value.data());
    for (std::size_t first = 0; first < rows.size(); first += kRowTile) {
      const auto now = rows.subspan(first, std::min<std::size_t>(kRowTile, rows.size() - first));
      std::array<std::int64_t, kRowTile> seen;
      for (std::size_t i = 0; i < now.size(); ++i) {
        seen[i] = visible_keys(split.position(group, now[i].row), tile, count, true);
      }
      if (seen[now.size() - 1] == 0) continue;
      tile_rows.attend(now, std::span(seen).first(now.size()), key.data(), value.data(), tile == begin);
    }
  }
}

// The result of one row, from its partial ones in the order of its keys.
void MergeRow(const SplitCall& split, const SplitGroup& group, std::int64_t row) {
  const F32 df;
  const std::int64_t dim = split.sizes.dim, position = split.position(group, row);
  const std::int64_t block_size = split.plan.problem.config.block_size;
  const std::int32_t* ids = split.memory.ids + (group.row + row) * split.plan.slots;
  const auto for_each_partial = [&](auto f) {
    for (std::int64_t slot = 0; slot < split.memory.counts[group.row + row]; ++slot) {
      const std::int64_t start = ids[slot] * block_size;
      const std::int64_t seen = visible_keys(position, start, block_size, true);
      for (std::int64_t piece = 0; piece * kPieceKeys < seen; ++piece) f(split.partial(group, row, slot, piece));
    }
  };
  float maximum = kMinusInf;
  for_each_partial([&](std::int64_t i) { maximum = std::max(maximum, split.memory.maximum[i]); });
  const VF reference = hn::Set(df, maximum == kMinusInf ? 0.0f : maximum);
  alignas(64) float total[256 + kLanes] = {};  // the longest head dim
  float sum = 0.0f;
  for_each_partial([&](std::int64_t i) {
    const VF weight = Exp2(hn::Sub(hn::Set(df, split.memory.maximum[i]), reference));
    const float* out = split.memory.out + i * dim;
    for (std::int64_t c = 0; c < dim; c += kLanes) {
      hn::Store(hn::MulAdd(weight, hn::LoadU(df, out + c), hn::Load(df, total + c)), df, total + c);
    }
    sum += hn::GetLane(weight) * split.memory.sum[i];
  });
  if (sum == 0.0f) std::fill_n(total, dim, 0.0f);
  const VF factor = hn::Set(df, sum == 0.0f ? 0.0f : 1.0f / sum);
  for (std::int64_t c = 0; c < dim; c += kLanes) {
    hn::Store(hn::MulAdd(hn::Load(df, total + c), factor, hn::Zero(df)), df, total + c);  // -0 becomes +0
  }
  const std::int64_t token = group.sequence->q_begin + row / split.plan.group;
  const std::int64_t head = group.head * split.plan.group + row % split.plan.group;
  Narrow(split.outputs.out.dtype, total, head_row(split.outputs.out, token, head), split.q.shape[2]);
  const Tensor& lse = split.outputs.lse;
  if (!lse.given()) return;
  static_cast<float*>(lse.data)[head * lse.stride[0] + token * lse.stride[1]] =
      sum == 0.0f ? kMinusInf : maximum * 0.6931471805599453f + std::log(sum);
}

void MergeTask(const SplitCall& split, const SplitGroup& group) {
  for (std::int64_t row = 0; row < split.rows(group); ++row) MergeRow(split, group, row);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(ScoreTask);
HWY_EXPORT(ChooseTask);
HWY_EXPORT(PieceTask);
HWY_EXPORT(MergeTask);

namespace {

// Whether this was the last task of the group. What the others wrote is seen by the thread that is told so.
bool last_of(const SplitCall& split, std::int64_t group) {
  return std::atomic_ref(split.memory.left[group]).fetch_sub(1, std::memory_order_acq_rel) == 1;
}

// The group that task `task` belongs to, where `first` tells the first task of each.
std::int64_t group_of(const std::vector<SplitGroup>& groups, std::int64_t SplitGroup::*first, std::int64_t task) {
  return std::ranges::upper_bound(groups, task, {}, first) - groups.begin() - 1;
}

// Tasks of the gate: tiles of scores, or one where there is nothing to score.
std::int64_t gate_tasks(const SplitCall& split, const SplitGroup& group) {
  const std::int64_t blocks = split.candidates(group, split.rows(group) - 1);
  return split.must_choose(blocks) ? ceil_div(blocks, kScoreTile) : 1;
}

void choose_all(SplitCall& split) {
  std::int64_t tasks = 0;
  for (std::size_t i = 0; i < split.groups.size(); ++i) {
    split.groups[i].first_tile = tasks;
    split.memory.left[i] = static_cast<std::int32_t>(gate_tasks(split, split.groups[i]));
    tasks += split.memory.left[i];
  }
  const auto score = MOBA_KERNEL(ScoreTask, split.plan.cpu_target);
  const auto choose_blocks = MOBA_KERNEL(ChooseTask, split.plan.cpu_target);
  parallel_for(split.plan.threads, tasks, [&](std::int64_t task, int slot) {
    const std::int64_t number = group_of(split.groups, &SplitGroup::first_tile, task);
    SplitGroup& group = split.groups[static_cast<std::size_t>(number)];
    const SplitScratch scratch = split.scratch(slot);
    if (split.must_choose(split.candidates(group, split.rows(group) - 1))) {
      score(split, group, task - group.first_tile, scratch);
    }
    if (last_of(split, number)) choose_blocks(split, group, number, scratch);
  });
}

void attend_all(SplitCall& split) {
  std::int64_t tasks = 0;
  for (std::size_t i = 0; i < split.groups.size(); ++i) {
    split.groups[i].first_task = tasks;
    split.memory.left[i] = static_cast<std::int32_t>(split.groups[i].blocks * split.sizes.pieces);
    tasks += split.memory.left[i];
  }
  const auto attend_piece = MOBA_KERNEL(PieceTask, split.plan.cpu_target);
  const auto merge_group = MOBA_KERNEL(MergeTask, split.plan.cpu_target);
  parallel_for(split.plan.threads, tasks, [&](std::int64_t task, int slot) {
    const std::int64_t number = group_of(split.groups, &SplitGroup::first_task, task);
    const SplitGroup& group = split.groups[static_cast<std::size_t>(number)];
    attend_piece(split, group, number, task - group.first_task, split.scratch(slot));
    if (last_of(split, number)) merge_group(split, group);
  });
}

void decode_whole(const CacheCall& call, const CachedSequence& s, const ConstTensor& q, const DecodeOutputs& outputs) {
  const SequenceCall one(call, s, q, outputs);
  gate(one.call, one.centroids, one.selection);
  index(one.call, one.selection);
  attend(one.call, one.selection, one.outputs);
}

}  // namespace

void decode(const CacheCall& call, const ConstTensor& q, const DecodeOutputs& outputs) {
  SplitCall split(call, q, outputs);
  const auto finish = [&] {
    if (split.groups.empty()) return;
    choose_all(split);
    attend_all(split);
    split.clear();
  };
  for (const CachedSequence& s : call.sequences) {
    if (s.q_len == 0 || !split.sizes.splits(call.plan, s)) continue;
    if (!split.fits(s)) finish();
    split.add(s);
  }
  finish();
  for (const CachedSequence& s : call.sequences) {
    if (s.q_len > 0 && !split.sizes.splits(call.plan, s)) decode_whole(call, s, q, outputs);
  }
}

}  // namespace moba::cpu
#endif
