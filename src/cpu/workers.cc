#include "cpu/workers.h"

#include "cpu/bf16_dot.h"
#include "cpu/targets.h"
#include "rope_table.h"

namespace moba::cpu {

namespace {

constexpr std::int64_t padded(std::int64_t n) { return ceil_div(n, kMaxLanes) * kMaxLanes; }

// Threads that can be at work at once in a step that takes scratch: no more than the most tasks of any.
std::int64_t busy_threads(const Plan::Impl& plan) {
  const Problem& p = plan.problem;
  const auto row_tasks = [&](std::int64_t tokens) { return ceil_div(p.total_q, tokens) * p.kv_heads; };
  const std::int64_t rope = ceil_div(p.total_q, RopeTable::kRun) + ceil_div(p.total_k, RopeTable::kRun);
  const std::int64_t tasks =
      std::max({rope, row_tasks(gate_tokens(plan)), row_tasks(attend_tokens(plan)), row_tasks(dense_tokens(plan))});
  return std::clamp<std::int64_t>(tasks, 1, plan.threads);
}

}  // namespace

// Rows of one attend task. A task packs every block that one of its rows chose, which costs about as much as 10 rows of
// arithmetic; so a task has enough rows that a block of a sequence of the longest length is chosen by 256 of them
// (measured at 16K tokens: 4096 rows a task 114 GFLOP/s, 8192 117, 16384 120). Few enough, though, to give each thread
// two tasks of nearly equal length.
std::int64_t attend_rows(const Plan::Impl& plan) {
  const Problem& p = plan.problem;
  const std::int64_t blocks = ceil_div(p.max_seqlen_k, p.config.block_size);
  const std::int64_t wanted = std::max<std::int64_t>(8192, 256 * blocks / plan.slots);
  const std::int64_t share = ceil_div(p.total_q * p.q_heads, 2 * std::int64_t{plan.threads});
  const std::int64_t bytes_limit = (64 << 20) / (4 * p.head_dim);
  return std::max<std::int64_t>(std::min({wanted, share, bytes_limit}), 512);
}

AttendScratch::AttendScratch(Carver& carver, std::int64_t rows, std::int64_t head_dim)
    : out(carver.take<float>(rows * padded(head_dim))),
      maximum(carver.take<float>(rows)),
      sum(carver.take<float>(rows)),
      row_ids(carver.take<std::int32_t>(rows)),
      keys(carver.take<float>(head_dim * kKeyTile)),
      values(carver.take<float>(kKeyTile * padded(head_dim))),
      q(carver.take<float>(kRowTile * padded(head_dim))),
      scores(carver.take<float>(kRowTile * kKeyTile)),
      pairs(carver.take<float>(kRowTile * kKeyTile / 2)) {}

GateScratch::GateScratch(Carver& carver, const Plan::Impl& plan)
    : centroids(carver.take<float>(plan.problem.head_dim *
                                   padded(ceil_div(plan.problem.max_seqlen_k, plan.problem.config.block_size)))),
      q(carver.take<float>(kRowTile * plan.problem.head_dim)),
      scores(carver.take<float>(kRowTile * kGateTile)),
      best(carver.take<std::int64_t>(kRowTile * plan.slots)),
      spare(carver.take<std::int64_t>(2 * (kGateTile + plan.slots))) {}

RopeScratch::RopeScratch(Carver& carver, const Plan::Impl& plan)
    : cos(carver.take<float>(RopeTable::kRun * plan.rope->pairs() + kMaxLanes)),
      sin(carver.take<float>(RopeTable::kRun * plan.rope->pairs() + kMaxLanes)) {}

void prepare(Plan::Impl& plan) {
  plan.cpu_target = find_target(plan.options.cpu_target);
  const Bf16Support bf16 = bf16_dot_support();
  const bool can_dot = bf16.available && MOBA_IS_AVX512(plan.cpu_target) && plan.problem.dtype == DType::bf16;
  plan.bf16_dot = can_dot && (plan.options.bf16_products == Bf16Products::dot ||
                              (plan.options.bf16_products == Bf16Products::automatic && bf16.preferred));
  plan.attend_rows = attend_rows(plan);
  plan.dense_rows = 1024;  // with d = 128 their queries and outputs take 1 MiB: they stay in L2 while all keys pass
  Carver attend, dense, gate, rope;
  AttendScratch(attend, attend_tokens(plan) * plan.group, plan.problem.head_dim);
  AttendScratch(dense, dense_tokens(plan) * plan.group, plan.problem.head_dim);
  GateScratch(gate, plan);
  if (plan.rope) RopeScratch(rope, plan);
  plan.scratch_per_thread = std::max({attend.used(), dense.used(), gate.used(), rope.used()});
  const std::int64_t counters = index_chunks(plan) * plan.problem.kv_heads * plan.max_blocks;
  plan.scratch_bytes = std::max(plan.scratch_per_thread * static_cast<std::size_t>(busy_threads(plan)),
                                static_cast<std::size_t>(counters) * sizeof(std::int64_t));
}

}  // namespace moba::cpu
