#include "cpu/workers.h"

#include "cpu/bf16_dot.h"
#include "cpu/targets.h"
#include "rope_table.h"

namespace moba::cpu {

namespace {

constexpr std::int64_t padded(std::int64_t n) { return ceil_div(n, kMaxLanes) * kMaxLanes; }

// Rows of one attend or backward task, no more than `share`. A task packs every block that one of its rows chose, which
// costs about as much as 10 rows of arithmetic; so a task has enough rows that a block of a sequence of the longest
// length is chosen by 256 of them (measured at 16K tokens: 4096 rows a task 114 GFLOP/s, 8192 117, 16384 120).
std::int64_t rows_of_task(const Plan::Impl& plan, std::int64_t share) {
  const Problem& p = plan.problem;
  const std::int64_t blocks = ceil_div(p.max_seqlen_k, p.config.block_size);
  const std::int64_t wanted = std::max<std::int64_t>(8192, 256 * blocks / plan.slots);
  const std::int64_t bytes_limit = (64 << 20) / (4 * p.head_dim);
  return std::max<std::int64_t>(std::min({wanted, share, bytes_limit}), 512);
}

// 64 tasks, whatever the number of threads.
std::int64_t backward_rows(const Plan::Impl& plan) {
  return rows_of_task(plan, ceil_div(plan.problem.total_q * plan.problem.q_heads, 64));
}

// Scratch of backward and dense_backward.
std::size_t backward_scratch(const Plan::Impl& plan) {
  const auto needed = [&](std::int64_t tokens) {
    const std::int64_t tasks = ceil_div(plan.problem.total_q, tokens);
    Carver shared, own;
    BackwardSums(shared, plan, tasks);
    BackwardScratch(own, plan, tokens * plan.group);
    const std::int64_t threads = std::clamp<std::int64_t>(
        std::max(tasks * plan.problem.kv_heads, ceil_div(plan.problem.total_k, RopeTable::kRun)), 1, plan.threads);
    return shared.used() + own.used() * static_cast<std::size_t>(threads);
  };
  return std::max(needed(backward_tokens(plan)), needed(dense_tokens(plan)));
}

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

// Few enough to give each thread two tasks of nearly equal length.
std::int64_t attend_rows(const Plan::Impl& plan) {
  return rows_of_task(plan, ceil_div(plan.problem.total_q * plan.problem.q_heads, 2 * std::int64_t{plan.threads}));
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
    : cos(plan.rope ? carver.take<float>(RopeTable::kRun * plan.rope->pairs() + kMaxLanes) : nullptr),
      sin(plan.rope ? carver.take<float>(RopeTable::kRun * plan.rope->pairs() + kMaxLanes) : nullptr) {}

BackwardSums::BackwardSums(Carver& carver, const Plan::Impl& plan, std::int64_t tasks)
    : dk(carver.take<float>(plan.problem.total_k * plan.problem.kv_heads * sum_stride(plan.problem.head_dim))),
      dv(carver.take<float>(plan.problem.total_k * plan.problem.kv_heads * sum_stride(plan.problem.head_dim))),
      passed(carver.take<std::int64_t>(plan.problem.kv_heads * tasks)) {}

BackwardScratch::BackwardScratch(Carver& carver, const Plan::Impl& plan, std::int64_t rows)
    : dq(carver.take<float>(rows * sum_stride(plan.problem.head_dim))),
      delta(carver.take<float>(rows)),
      lse(carver.take<float>(rows)),
      finite(carver.take<std::int32_t>(rows)),
      row_ids(carver.take<std::int32_t>(rows)),
      keys(carver.take<float>(plan.problem.head_dim * kKeyTile)),
      values(carver.take<float>(plan.problem.head_dim * kKeyTile)),
      key_rows(carver.take<float>(kKeyTile * odd_lines(plan.problem.head_dim))),
      q(carver.take<float>(kRowTile * odd_lines(plan.problem.head_dim))),
      dout(carver.take<float>(kRowTile * odd_lines(plan.problem.head_dim))),
      p(carver.take<float>(kRowTile * kScoreStride)),
      ds(carver.take<float>(kRowTile * kScoreStride)),
      dk(carver.take<float>(kKeyTile * sum_stride(plan.problem.head_dim))),
      dv(carver.take<float>(kKeyTile * sum_stride(plan.problem.head_dim))),
      rope(carver, plan) {}

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
  RopeScratch(rope, plan);
  plan.scratch_per_thread = std::max({attend.used(), dense.used(), gate.used(), rope.used()});
  const std::int64_t counters = index_chunks(plan) * plan.problem.kv_heads * plan.max_blocks;
  plan.scratch_bytes = std::max(plan.scratch_per_thread * static_cast<std::size_t>(busy_threads(plan)),
                                static_cast<std::size_t>(counters) * sizeof(std::int64_t));
  plan.backward_rows = backward_rows(plan);
  plan.backward_scratch_bytes = std::max(plan.rope ? plan.scratch_bytes : 0, backward_scratch(plan));
}

}  // namespace moba::cpu
