// CachePlan: the bounds of a cache, and the memory that its calls take.
#include <algorithm>
#include <limits>
#include <string>

#include "cache_call.h"
#include "refuse.h"

namespace moba {

namespace {

constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();

void check(const CacheProblem& p, const Options& options) {
  if (options.backend == Backend::cuda)
    refuse("options.backend", "cuda", "cpu, reference: a cache is served there only");
  check_range("max_batch", p.max_batch, 1, kMaxRows);
  check_range("max_new_tokens", p.max_new_tokens, 1, kMaxRows);
  check_range("max_length", p.max_length, 1, kMaxRows);
  if (!p.config.causal) refuse("config.causal", "false", "true: the tokens after a query are not in the cache yet");
  if (p.kv_heads > 0 && p.q_heads / p.kv_heads > kMaxRows / p.max_new_tokens) {
    refuse("max_new_tokens", p.max_new_tokens, "q_heads / kv_heads * max_new_tokens up to " + std::to_string(kMaxRows));
  }
}

// One sequence that takes all the new tokens of a call.
Problem sequence_problem(const CacheProblem& p) {
  Problem one;
  one.dtype = p.dtype;
  one.q_heads = p.q_heads;
  one.kv_heads = p.kv_heads;
  one.head_dim = p.head_dim;
  one.total_q = p.max_new_tokens;
  one.total_k = p.max_length;
  one.config = p.config;
  one.rope = p.rope;
  return one;
}

Plan checked_plan(const CacheProblem& problem, const Options& options) {
  check(problem, options);
  return Plan(sequence_problem(problem), options);
}

}  // namespace

CachePlan::CachePlan(const CacheProblem& problem, const Options& options) {
  const auto made = std::make_shared<Impl>(Impl{problem, checked_plan(problem, options), nullptr});
  Impl& plan = *made;
  const Plan::Impl& one = plan.plan.impl();
  CacheProblem& p = plan.problem;
  checked_product("max_length * q_heads * head_dim", {p.max_length, p.q_heads, p.head_dim});
  p.config = one.problem.config;
  p.rope = one.problem.rope;
  plan.max_blocks = p.max_length / p.config.block_size;
  plan.steps = options.backend == Backend::cpu ? &cpu::kCacheSteps : &reference::kCacheSteps;
  // A call of few tokens may keep more threads busy than one of many.
  plan.scratch_bytes =
      aligned(std::max(one.scratch_bytes, one.scratch_per_thread * static_cast<std::size_t>(one.threads)));
  plan.rotated_bytes = one.q_rotated_bytes;
  plan.decode_bytes = aligned(plan.steps->decode_bytes(plan));
  impl_ = made;
}

CachePlan::~CachePlan() = default;
CachePlan::CachePlan(const CachePlan&) = default;
CachePlan& CachePlan::operator=(const CachePlan&) = default;

const CacheProblem& CachePlan::problem() const { return impl_->problem; }
const Options& CachePlan::options() const { return impl_->plan.options(); }
std::int64_t CachePlan::max_blocks() const { return impl_->max_blocks; }
std::int64_t CachePlan::slots() const { return impl_->plan.slots(); }
int CachePlan::threads() const { return impl_->plan.threads(); }
std::string CachePlan::kernels() const { return impl_->plan.kernels(); }

std::size_t CachePlan::workspace_bytes() const {
  // kAlignment more than the pieces: the caller's memory may start anywhere.
  return kAlignment + impl_->scratch_bytes + impl_->rotated_bytes + impl_->decode_bytes;
}

}  // namespace moba
