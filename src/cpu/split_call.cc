#include "cpu/split_call.h"

#include "cpu/targets.h"

namespace moba::cpu {

namespace {

constexpr std::int64_t padded(std::int64_t n, std::int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// What decode keeps when it splits: the memory of the whole call, then the scratch of each thread.
struct Layout {
  std::size_t memory, scratch;

  Layout(const CachePlan::Impl& plan, const SplitSizes& sizes) {
    Carver shared, own;
    SplitMemory(shared, plan, sizes);
    SplitScratch(own, plan, sizes);
    memory = shared.used();
    scratch = own.used();
  }
};

}  // namespace

SplitSizes::SplitSizes(const CachePlan::Impl& plan) {
  const CacheProblem& p = plan.problem;
  const std::int64_t slots = plan.plan.slots();
  pieces = ceil_div(std::min(p.config.block_size, p.max_length), kPieceKeys);
  units = slots * pieces;
  columns = slots > 1 ? padded(plan.max_blocks, kGateTile) : 0;
  dim = padded(p.head_dim, kMaxLanes);
  rows = std::min(p.max_new_tokens * p.q_heads, std::max({std::int64_t{1024}, kSplitRows * p.kv_heads, p.q_heads}));
  partials = std::max(std::min(kSplitUnits, rows * units), p.q_heads * units);
}

bool SplitSizes::splits(const CachePlan::Impl& plan, const CachedSequence& s) const {
  const CacheProblem& p = plan.problem;
  return s.q_len == 1 ||
         (s.q_len * (p.q_heads / p.kv_heads) <= kSplitRows && s.q_len * p.q_heads * units <= kSplitUnits);
}

SplitMemory::SplitMemory(Carver& carver, const CachePlan::Impl& plan, const SplitSizes& sizes)
    : ids(carver.take<std::int32_t>(sizes.rows * plan.plan.slots())),
      counts(carver.take<std::int32_t>(sizes.rows)),
      scores(carver.take<float>(sizes.rows * sizes.columns)),
      choices(carver.take<Choice>(sizes.rows * plan.plan.slots())),
      block_starts(carver.take<std::int32_t>(sizes.rows * (plan.plan.slots() + 1))),
      left(carver.take<std::int32_t>(sizes.rows)),
      maximum(carver.take<float>(sizes.partials)),
      sum(carver.take<float>(sizes.partials)),
      out(carver.take<float>(sizes.partials * sizes.dim)) {}

SplitScratch::SplitScratch(Carver& carver, const CachePlan::Impl& plan, const SplitSizes& sizes)
    : q(carver.take<float>(kRowTile * sizes.dim)),
      centroids(carver.take<float>(plan.problem.head_dim * kScoreTile)),
      keys(carver.take<float>(kKeyTile * sizes.dim)),
      values(carver.take<float>(kKeyTile * sizes.dim)),
      scores(carver.take<float>(kRowTile * kKeyTile)),
      best(carver.take<std::int64_t>(plan.plan.slots())),
      spare(carver.take<std::int64_t>(2 * (kGateTile + plan.plan.slots()))) {}

std::size_t decode_bytes(const CachePlan::Impl& plan) {
  const Layout layout(plan, SplitSizes(plan));
  return std::max(SequenceCall::bytes(plan),
                  layout.memory + layout.scratch * static_cast<std::size_t>(plan.plan.threads()));
}

SplitCall::SplitCall(const CacheCall& whole, const ConstTensor& queries, const DecodeOutputs& to)
    : call(whole),
      plan(whole.plan.plan.impl()),
      q(queries),
      outputs(to),
      sizes(whole.plan),
      wanted(plan.slots - 1),
      scale(static_cast<float>(plan.scale * 1.4426950408889634)),
      memory([&] {
        Carver carver(whole.memory.data());
        return SplitMemory(carver, whole.plan, sizes);
      }()) {
  const Layout layout(whole.plan, sizes);
  scratch_memory = whole.memory.data() + layout.memory;
  scratch_bytes = layout.scratch;
}

SplitScratch SplitCall::scratch(int slot) const {
  Carver carver(scratch_memory + scratch_bytes * static_cast<std::size_t>(slot));
  return SplitScratch(carver, call.plan, sizes);
}

bool SplitCall::fits(const CachedSequence& s) const {
  const std::int64_t used = groups.empty() ? 0 : groups.back().row + rows(groups.back());
  const std::int64_t needed = used + s.q_len * plan.problem.q_heads;
  return needed <= sizes.rows && needed * sizes.units <= sizes.partials;
}

void SplitCall::add(const CachedSequence& s) {
  for (std::int64_t head = 0; head < plan.problem.kv_heads; ++head) {
    const std::int64_t row = groups.empty() ? 0 : groups.back().row + rows(groups.back());
    groups.push_back({&s, head, row, row * plan.slots, 0, 0, 0});
  }
}

void SplitCall::clear() { groups.clear(); }

void SplitCall::write_ids(const SplitGroup& group, std::int64_t row, std::span<const std::int32_t> ids) const {
  const Tensor& to = outputs.ids;
  if (!to.given()) return;
  const std::int64_t token = group.sequence->q_begin + row / plan.group,
                     head = group.head * plan.group + row % plan.group;
  std::int32_t* at = static_cast<std::int32_t*>(to.data) + token * to.stride[0] + head * to.stride[1];
  std::fill(std::copy(ids.begin(), ids.end(), at), at + plan.slots, -1);
}

}  // namespace moba::cpu
