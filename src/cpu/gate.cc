// gate: scores of a tile of query rows against all candidate centroids of their sequence, and the best of them, kept
// per row in a short sorted list. The scores exist a tile at a time.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gate.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "call.h"
#include "cpu/best_blocks-inl.h"
#include "cpu/lanes-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/product-inl.h"
#include "cpu/targets.h"
#include "cpu/workers.h"
#include "parallel.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

// The rows of one key head among the query tokens of one sequence.
class GateRows {
 public:
  GateRows(const Call& call, const Sequence& sequence, std::int64_t kv_head, const GateScratch& scratch)
      : call_(call),
        sequence_(sequence),
        kv_head_(kv_head),
        group_(call.plan.group),
        dim_(call.plan.problem.head_dim),
        causal_(call.plan.problem.config.causal),
        block_size_(call.plan.problem.config.block_size),
        wanted_(std::min(call.plan.problem.config.top_k, call.plan.slots) - (causal_ ? 1 : 0)),
        s_(scratch) {}

  void run(const ConstTensor& centroids, const Selection& selection, std::int64_t begin, std::int64_t end) {
    if (must_choose(end - 1)) {
      columns_ = RoundUp(candidates(end - 1), kKeyStep);
      const std::int64_t stride = centroids.stride[0] * static_cast<std::int64_t>(size_in_bytes(centroids.dtype));
      PackKeys<false>({head_row(centroids, 0, kv_head_), stride, centroids.dtype, dim_}, sequence_.block_begin,
                      candidates(end - 1), s_.centroids);
    }
    for (std::int64_t row = begin * group_; row < end * group_; row += kRowTile) {
      run_tile(selection, row, std::min(end * group_, row + kRowTile));
    }
  }

 private:
  std::int64_t position(std::int64_t row) const {
    return sequence_.first_position() + row / group_ - sequence_.q_begin;
  }
  std::int64_t query_head(std::int64_t row) const { return kv_head_ * group_ + row % group_; }
  // Blocks that a query may choose freely: causal, those before its own.
  std::int64_t candidates(std::int64_t token) const {
    if (!causal_) return sequence_.blocks;
    return std::max<std::int64_t>(0, position(token * group_)) / block_size_;
  }
  bool must_choose(std::int64_t token) const { return wanted_ > 0 && candidates(token) > wanted_; }

  // Rows token * g + head in [begin, end), at most kRowTile.
  void run_tile(const Selection& selection, std::int64_t begin, std::int64_t end) {
    std::array<BestBlocks, kRowTile> best;
    if (must_choose((end - 1) / group_)) choose(begin, end, best);
    for (std::int64_t row = begin; row < end; ++row) {
      write(selection, row, best[static_cast<std::size_t>(row - begin)]);
    }
  }

  void choose(std::int64_t begin, std::int64_t end, std::array<BestBlocks, kRowTile>& best) {
    std::array<float*, kRowTile> scores;
    for (std::int64_t i = 0; i < end - begin; ++i) {
      best[static_cast<std::size_t>(i)] = BestBlocks(s_.best + i * call_.plan.slots, wanted_);
      scores[static_cast<std::size_t>(i)] = s_.scores + i * kGateTile;
      Widen(call_.q.dtype, head_row(call_.q, (begin + i) / group_, query_head(begin + i)), s_.q + i * dim_, dim_);
    }
    const std::int64_t most = candidates((end - 1) / group_);
    for (std::int64_t first = (most - 1) / kGateTile * kGateTile; first >= 0; first -= kGateTile) {
      const std::int64_t blocks = std::min(kGateTile, most - first);
      Multiply<false>(s_.q, dim_, end - begin, s_.centroids + first * dim_, dim_, columns_ - first, blocks, dim_,
                      scores.data(), nullptr);
      for (std::int64_t i = 0; i < end - begin; ++i) {
        const std::int64_t n = std::min(blocks, candidates((begin + i) / group_) - first);
        if (n <= 0) continue;
        best[static_cast<std::size_t>(i)].offer(scores[static_cast<std::size_t>(i)], first, n, s_.spare);
      }
    }
  }

  void write(const Selection& selection, std::int64_t row, const BestBlocks& best) const {
    const std::int64_t token = row / group_;
    std::int32_t* ids = static_cast<std::int32_t*>(selection.ids.data) + token * selection.ids.stride[0] +
                        query_head(row) * selection.ids.stride[1];
    std::int64_t count = 0;
    if (must_choose(token)) {
      count = best.blocks(ids);
    } else if (wanted_ > 0) {
      count = candidates(token);
      std::iota(ids, ids + count, 0);
    }
    if (causal_ && position(row) >= 0) ids[count++] = static_cast<std::int32_t>(position(row) / block_size_);
    std::fill(ids + count, ids + call_.plan.slots, -1);
    static_cast<std::int32_t*>(
        selection.counts.data)[token * selection.counts.stride[0] + query_head(row) * selection.counts.stride[1]] =
        static_cast<std::int32_t>(count);
  }

  const Call& call_;
  const Sequence& sequence_;
  const std::int64_t kv_head_, group_, dim_;
  const bool causal_;
  const std::int64_t block_size_, wanted_;  // blocks to choose by score: k, or k - 1 beside the own block
  const GateScratch& s_;
  std::int64_t columns_ = 0;  // of the packed centroids
};

void GateTask(const Call& call, const ConstTensor& centroids, const Selection& selection, std::int64_t kv_head,
              std::int64_t begin, std::int64_t end, const GateScratch& scratch) {
  for_each_sequence(call.sequences, begin, end, [&](const Sequence& sequence, std::int64_t first, std::int64_t last) {
    GateRows(call, sequence, kv_head, scratch).run(centroids, selection, first, last);
  });
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(GateTask);

void gate(const Call& call, const ConstTensor& centroids, const Selection& selection) {
  const std::int64_t tokens = call.plan.problem.total_q, heads = call.plan.problem.kv_heads;
  const std::int64_t step = gate_tokens(call.plan), chunks = ceil_div(tokens, step);
  const auto task = MOBA_KERNEL(GateTask, call.plan.cpu_target);
  parallel_for(call.plan.threads, chunks * heads, [&](std::int64_t i, int slot) {
    const std::int64_t begin = i / heads * step;
    Carver carver(thread_scratch(call, slot));
    const GateScratch scratch(carver, call.plan);
    task(call, centroids, selection, i % heads, begin, std::min(tokens, begin + step), scratch);
  });
}

}  // namespace moba::cpu
#endif
