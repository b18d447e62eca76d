// A long prompt in chunks, as servers run it: the queries of one chunk at a time over all keys so far (len_q < len_k),
// with the same result as the whole prompt at once. Then full attention of the last chunk put together from two key
// ranges, each computed on its own, by their log-sum-exp.
#include <moba/moba.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

namespace {

constexpr std::int64_t kTokens = 1200, kChunk = 400, kQueryHeads = 4, kKeyHeads = 2, kHeadDim = 64;
constexpr std::int64_t kQueryRow = kQueryHeads * kHeadDim, kKeyRow = kKeyHeads * kHeadDim;

std::vector<float> made_up(std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  return values;
}

float largest_difference(const float* a, const float* b, std::int64_t size) {
  float largest = 0;
  for (std::int64_t i = 0; i < size; ++i) largest = std::fmax(largest, std::fabs(a[i] - b[i]));
  return largest;
}

struct Cache {
  std::vector<float> q = made_up(kTokens * kQueryRow, 1);
  std::vector<float> k = made_up(kTokens * kKeyRow, 2);
  std::vector<float> v = made_up(kTokens * kKeyRow, 3);

  // The queries of tokens [q_begin, q_end) over the keys of [k_begin, k_end).
  moba::Inputs inputs(std::int64_t q_begin, std::int64_t q_end, std::int64_t k_begin, std::int64_t k_end) const {
    moba::Inputs in;
    in.q = {q.data() + q_begin * kQueryRow, moba::DType::f32, {q_end - q_begin, kQueryHeads, kHeadDim}};
    in.k = {k.data() + k_begin * kKeyRow, moba::DType::f32, {k_end - k_begin, kKeyHeads, kHeadDim}};
    in.v = {v.data() + k_begin * kKeyRow, moba::DType::f32, {k_end - k_begin, kKeyHeads, kHeadDim}};
    return in;
  }
};

// out and lse of `tokens` tokens, with memory behind them.
struct Result {
  explicit Result(std::int64_t tokens)
      : out(static_cast<std::size_t>(tokens * kQueryRow)), lse(static_cast<std::size_t>(tokens * kQueryHeads)) {
    views.out = {out.data(), moba::DType::f32, {tokens, kQueryHeads, kHeadDim}};
    views.lse = {lse.data(), moba::DType::f32, {kQueryHeads, tokens}};
  }
  std::vector<float> out, lse;
  moba::Outputs views;
};

moba::Plan make_plan(std::int64_t total_q, std::int64_t total_k, bool causal = true) {
  moba::Problem problem;
  problem.q_heads = kQueryHeads;
  problem.kv_heads = kKeyHeads;
  problem.head_dim = kHeadDim;
  problem.total_q = total_q;
  problem.total_k = total_k;
  problem.config.block_size = 64;
  problem.config.top_k = 4;
  problem.config.causal = causal;
  return moba::Plan(problem);
}

int run() {
  const Cache cache;
  std::vector<std::byte> workspace;
  const auto workspace_for = [&](const moba::Plan& plan) {
    workspace.resize(std::max(workspace.size(), plan.workspace_bytes()));
    return moba::Workspace(workspace);
  };

  // The whole prompt at once, and the same chunk by chunk. Query i of a chunk sits at position len_k - len_q + i.
  Result whole(kTokens), chunked(kTokens);
  const moba::Plan plan = make_plan(kTokens, kTokens);
  moba::forward(plan, cache.inputs(0, kTokens, 0, kTokens), whole.views, workspace_for(plan));
  for (std::int64_t begin = 0; begin < kTokens; begin += kChunk) {
    const std::int64_t end = std::min(begin + kChunk, kTokens);
    const moba::Plan chunk_plan = make_plan(end - begin, end);
    moba::Outputs part;  // out only, straight into its place
    part.out = {chunked.out.data() + begin * kQueryRow, moba::DType::f32, {end - begin, kQueryHeads, kHeadDim}};
    moba::forward(chunk_plan, cache.inputs(begin, end, 0, end), part, workspace_for(chunk_plan));
  }
  const float chunk_off = largest_difference(whole.out.data(), chunked.out.data(), kTokens * kQueryRow);
  std::printf("whole prompt and chunks of %d: largest difference %g\n", static_cast<int>(kChunk),
              static_cast<double>(chunk_off));

  // Full attention of the last chunk: over the keys before it (no mask), over its own keys (causal), and merged.
  constexpr std::int64_t kBegin = kTokens - kChunk;
  Result past(kChunk), own(kChunk), merged(kChunk), full(kChunk);
  const moba::Plan past_plan = make_plan(kChunk, kBegin, false), own_plan = make_plan(kChunk, kChunk);
  const moba::Plan full_plan = make_plan(kChunk, kTokens);
  moba::dense(past_plan, cache.inputs(kBegin, kTokens, 0, kBegin), past.views, workspace_for(past_plan));
  moba::dense(own_plan, cache.inputs(kBegin, kTokens, kBegin, kTokens), own.views, workspace_for(own_plan));
  moba::merge(full_plan, std::array{past.views, own.views}, merged.views);
  moba::dense(full_plan, cache.inputs(kBegin, kTokens, 0, kTokens), full.views, workspace_for(full_plan));
  const float merge_off = largest_difference(full.out.data(), merged.out.data(), kChunk * kQueryRow);
  std::printf("full attention at once and merged of two: largest difference %g\n", static_cast<double>(merge_off));
  return chunk_off < 1e-5f && merge_off < 1e-5f ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "chunked_prefill: %s\n", error.what());
    return 1;
  }
}
