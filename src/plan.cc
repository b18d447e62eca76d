#include "moba/plan.h"

#include <oneapi/tbb/info.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.h"
#include "checks.h"
#include "cpu/targets.h"
#include "cpu/workers.h"
#include "cuda/backend.h"
#include "plan_impl.h"
#include "refuse.h"

namespace moba {

namespace {

std::size_t bytes_of(DType dtype, std::int64_t count) {
  return aligned(size_in_bytes(dtype) * static_cast<std::size_t>(count));
}

int default_threads() { return oneapi::tbb::info::default_concurrency(); }

// The sum of min(b, most) over b in [0, n).
double sum_of_least(double n, double most) {
  if (n <= most + 1) return n * (n - 1) / 2;
  return most * (most + 1) / 2 + (n - 1 - most) * most;
}

// The sum over causal rows at positions [0, n) of the keys that `others` past blocks at most and the own block hold.
double causal_keys(double n, double block_size, double others) {
  const double blocks = std::floor(n / block_size), rest = n - blocks * block_size;
  return block_size * block_size * sum_of_least(blocks, others) + blocks * block_size * (block_size + 1) / 2 +
         rest * block_size * std::min(blocks, others) + rest * (rest + 1) / 2;
}

// The sum over causal rows at positions [0, n) of their past blocks.
double causal_candidates(double n, double block_size) {
  const double blocks = std::floor(n / block_size);
  return block_size * blocks * (blocks - 1) / 2 + (n - blocks * block_size) * blocks;
}

// Pairs (query, key) that one head attends to in one sequence, when every row fills its k (the own block is cut by the
// causal mask; the other chosen blocks are whole).
double pairs_kept(const Config& config, double q_len, double k_len) {
  const double b = static_cast<double>(config.block_size), k = static_cast<double>(config.top_k);
  if (!config.causal) return q_len * std::min(std::min(k, std::ceil(k_len / b)) * b, k_len);
  return causal_keys(k_len, b, k - 1) - causal_keys(std::max(0.0, k_len - q_len), b, k - 1);
}

// Scores that the gate needs for one head of one sequence: one per (query, candidate block).
double scores_needed(const Config& config, double q_len, double k_len) {
  const double b = static_cast<double>(config.block_size);
  if (!config.causal) return q_len * std::ceil(k_len / b);
  return causal_candidates(k_len, b) - causal_candidates(std::max(0.0, k_len - q_len), b);
}

}  // namespace

const char* name(Backend backend) {
  switch (backend) {
    case Backend::cpu:
      return "cpu";
    case Backend::reference:
      return "reference";
    case Backend::cuda:
      return "cuda";
  }
  return "unknown";
}

Plan::Plan(const Problem& problem, const Options& options) {
  const auto made = std::make_shared<Impl>();
  impl_ = made;
  Impl& plan = *made;
  plan.problem = checked(problem, options);
  plan.options = options;
  const Problem& p = plan.problem;
  plan.threads = options.backend != Backend::cpu ? 1 : options.threads > 0 ? options.threads : default_threads();
  plan.group = p.q_heads / p.kv_heads;
  plan.slots = std::max<std::int64_t>(1, std::min(p.config.top_k, ceil_div(p.max_seqlen_k, p.config.block_size)));
  // A sequence of l > 0 keys has (l - 1) / B + 1 blocks: the more sequences that are not empty, the more blocks.
  const std::int64_t filled = std::min(p.batch, p.total_k);
  plan.max_blocks = filled == 0 ? 0 : (p.total_k - filled) / p.config.block_size + filled;
  plan.scale = *p.config.scale;
  plan.forward_is_dense = ceil_div(p.max_seqlen_k, p.config.block_size) <= p.config.top_k;
  if (p.rope) plan.rope = std::make_shared<RopeTable>(*p.rope, p.head_dim);
  plan.q_rotated_bytes = p.rope ? bytes_of(p.dtype, p.total_q * p.q_heads * p.head_dim) : 0;
  plan.k_rotated_bytes = p.rope ? bytes_of(p.dtype, p.total_k * p.kv_heads * p.head_dim) : 0;
  plan.centroids_bytes = bytes_of(p.dtype, plan.max_blocks * p.kv_heads * p.head_dim);
  plan.selection_bytes = plan.forward_is_dense ? 0 : selection_bytes();
  switch (options.backend) {
    case Backend::cpu:
      plan.steps = &cpu::kSteps;
      cpu::prepare(plan);
      break;
    case Backend::reference:
      plan.steps = &reference::kSteps;
      break;
    case Backend::cuda:
      cuda::prepare(plan);
      break;
  }
}

Plan::~Plan() = default;
Plan::Plan(const Plan&) = default;
Plan& Plan::operator=(const Plan&) = default;

const Problem& Plan::problem() const { return impl_->problem; }
const Options& Plan::options() const { return impl_->options; }
std::int64_t Plan::slots() const { return impl_->slots; }
std::int64_t Plan::max_blocks() const { return impl_->max_blocks; }
bool Plan::forward_is_dense() const { return impl_->forward_is_dense; }
int Plan::threads() const { return impl_->threads; }

std::size_t Plan::workspace_bytes() const {
  // kAlignment more than the pieces: the caller's memory may start anywhere.
  return kAlignment + aligned(impl_->scratch_bytes) + impl_->q_rotated_bytes + impl_->k_rotated_bytes +
         impl_->centroids_bytes + impl_->selection_bytes;
}

std::size_t Plan::backward_workspace_bytes() const {
  return kAlignment + aligned(impl_->backward_scratch_bytes) + impl_->q_rotated_bytes + impl_->k_rotated_bytes;
}

std::size_t Plan::ids_bytes(bool shared) const {
  const Problem& p = impl_->problem;
  return bytes_of(DType::i32, p.total_q * (shared ? p.kv_heads : p.q_heads) * impl_->slots);
}

std::size_t Plan::selection_bytes(bool shared) const {
  const Problem& p = impl_->problem;
  const std::int64_t heads = shared ? p.kv_heads : p.q_heads;
  return ids_bytes(shared) + bytes_of(DType::i32, p.total_q * heads) +
         bytes_of(DType::i64, p.kv_heads * impl_->max_blocks + 1) +
         bytes_of(DType::i32, p.total_q * p.q_heads * impl_->slots);
}

std::string Plan::kernels() const {
  if (impl_->options.backend == Backend::reference) return "reference, float64, 1 thread";
  if (impl_->options.backend == Backend::cuda) return cuda::describe_kernels(*impl_);
  return "cpu " + cpu::target_name(impl_->cpu_target) +
         (impl_->bf16_dot ? ", bfloat16 pair products, " : ", float32 products, ") + std::to_string(impl_->threads) +
         (impl_->threads == 1 ? " thread" : " threads") +
         (impl_->forward_is_dense ? ", every block chosen: full attention" : "");
}

Arithmetic Plan::arithmetic(const std::vector<std::int64_t>& cu_seqlens_q,
                            const std::vector<std::int64_t>& cu_seqlens_k) const {
  const Problem& p = impl_->problem;
  check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, p.batch, p.total_q, p.max_seqlen_q);
  check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, p.batch, p.total_k, p.max_seqlen_k);
  const double d = static_cast<double>(p.head_dim), heads = static_cast<double>(p.q_heads);
  Config full = p.config;
  full.top_k = std::numeric_limits<std::int64_t>::max();
  Arithmetic sum;
  for (std::size_t s = 0; s + 1 < cu_seqlens_q.size(); ++s) {
    const auto q_len = static_cast<double>(cu_seqlens_q[s + 1] - cu_seqlens_q[s]);
    const auto k_len = static_cast<double>(cu_seqlens_k[s + 1] - cu_seqlens_k[s]);
    const double kept = heads * pairs_kept(p.config, q_len, k_len);
    sum.pairs += kept;
    sum.pool += k_len * static_cast<double>(p.kv_heads) * d;
    sum.gate += 2 * d * heads * scores_needed(p.config, q_len, k_len);
    sum.attend += 4 * d * kept;
    sum.dense += 4 * d * heads * pairs_kept(full, q_len, k_len);
  }
  sum.backward = 2.5 * sum.attend;  // five products where the forward has two
  sum.dense_backward = 2.5 * sum.dense;
  return sum;
}

Arithmetic Plan::arithmetic() const {
  const Problem& p = impl_->problem;
  if (p.batch == 0) return arithmetic({0}, {0});
  if (p.batch != 1) refuse("batch", p.batch, "0 or 1 where cu_seqlens are not given");
  return arithmetic({0, p.total_q}, {0, p.total_k});
}

}  // namespace moba
