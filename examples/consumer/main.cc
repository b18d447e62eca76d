// MoBA attention over made-up data, once in one call and once stage by stage. Exits with 1 if the two differ.
#include <moba/moba.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

namespace {

std::vector<float> made_up(std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  return values;
}

int run() {
  constexpr std::int64_t kTokens = 2000, kQueryHeads = 4, kKeyHeads = 2, kHeadDim = 64;

  // What to compute, from shapes alone. The plan says which memory it takes before anything runs.
  moba::Problem problem;
  problem.dtype = moba::DType::f32;
  problem.q_heads = kQueryHeads;
  problem.kv_heads = kKeyHeads;
  problem.head_dim = kHeadDim;
  problem.total_q = problem.total_k = kTokens;
  problem.config.block_size = 128;
  problem.config.top_k = 4;
  const moba::Plan plan(problem);
  std::vector<std::byte> workspace(plan.workspace_bytes());
  std::printf("moba %s, %s, workspace %.1f MiB\n", moba::version(), plan.kernels().c_str(),
              static_cast<double>(plan.workspace_bytes()) / (1 << 20));

  // Tensors are views of the caller's memory.
  const std::vector<float> q = made_up(kTokens * kQueryHeads * kHeadDim, 1);
  const std::vector<float> k = made_up(kTokens * kKeyHeads * kHeadDim, 2);
  const std::vector<float> v = made_up(kTokens * kKeyHeads * kHeadDim, 3);
  std::vector<float> out(q.size()), lse(kQueryHeads * kTokens);
  moba::Inputs inputs;
  inputs.q = moba::ConstTensor(q.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim});
  inputs.k = moba::ConstTensor(k.data(), moba::DType::f32, {kTokens, kKeyHeads, kHeadDim});
  inputs.v = moba::ConstTensor(v.data(), moba::DType::f32, {kTokens, kKeyHeads, kHeadDim});
  moba::Outputs outputs;
  outputs.out = moba::Tensor(out.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim});
  outputs.lse = moba::Tensor(lse.data(), moba::DType::f32, {kQueryHeads, kTokens});

  // In one call.
  moba::forward(plan, inputs, outputs, workspace);

  // Stage by stage: choose the blocks, then attend to them. The selection lies in the caller's memory as well.
  std::vector<std::byte> memory(plan.selection_bytes());
  const moba::Selection selection = moba::make_selection(plan, memory);
  moba::select(plan, inputs, selection, workspace);
  std::vector<float> staged(out.size());
  moba::Outputs staged_outputs;
  staged_outputs.out = moba::Tensor(staged.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim});
  moba::attend(plan, inputs, selection, staged_outputs, workspace);

  // The first token sees itself only, so its output is its own value.
  float first_off = 0;
  for (std::int64_t i = 0; i < kHeadDim; ++i) first_off = std::fmax(first_off, std::fabs(out[i] - v[i]));
  const bool same = std::memcmp(out.data(), staged.data(), out.size() * sizeof(float)) == 0;
  std::printf("first token: off its own value by %g\n", static_cast<double>(first_off));
  std::printf("forward and select + attend: %s\n", same ? "the same bits" : "DIFFERENT");
  return same && first_off < 1e-6f ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {  // moba::Error says which argument was refused, and why
    std::fprintf(stderr, "consumer: %s\n", error.what());
    return 1;
  }
}
