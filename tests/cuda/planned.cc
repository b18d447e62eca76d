#include "planned.h"

#include "cuda/backend.h"

namespace moba::test {

Problem problem_of(std::int64_t tokens, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t head_dim,
                   const Config& config) {
  Problem p;
  p.dtype = DType::bf16;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.total_q = p.total_k = tokens;
  p.config = config;
  return p;
}

Problem good_problem() { return problem_of(4096, 8, 2, 128, {.block_size = 128, .top_k = 8}); }

Plan::Impl planned(const Problem& problem, const cuda::DeviceLimits& device, const std::string& family,
                   std::size_t limit) {
  Plan::Impl plan = Plan(problem, {.threads = 1}).impl();
  plan.options = {};
  plan.options.backend = Backend::cuda;
  plan.options.cuda_kernels = family;
  plan.options.workspace_limit = limit;
  cuda::prepare(plan, device);
  return plan;
}

std::size_t workspace_of(const Plan::Impl& plan) {
  return kAlignment + aligned(plan.scratch_bytes) + plan.q_rotated_bytes + plan.k_rotated_bytes + plan.centroids_bytes +
         plan.selection_bytes;
}

std::size_t backward_workspace_of(const Plan::Impl& plan) {
  return kAlignment + aligned(plan.backward_scratch_bytes) + plan.q_rotated_bytes + plan.k_rotated_bytes;
}

std::string message_of(const Problem& problem, const cuda::DeviceLimits& device, const std::string& family,
                       std::size_t limit) {
  try {
    planned(problem, device, family, limit);
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

std::size_t granted(const Problem& problem, const cuda::DeviceLimits& device, std::size_t limit) {
  const std::string message = message_of(problem, device, "", limit), mark = "at least ";
  if (message == "accepted") return limit;
  EXPECT_NE(message.find("options.workspace_limit: is "), std::string::npos) << message;
  const std::size_t at = message.find(mark);
  return at == std::string::npos ? 0 : std::stoull(message.substr(at + mark.size()));
}

std::size_t key_sums(const Problem& problem) {
  return static_cast<std::size_t>(problem.total_k * problem.head_dim) * 2 * sizeof(float);
}

}  // namespace moba::test
