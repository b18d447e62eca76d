// Looks at the blocks that MoBA chooses, changes the choice, and attends to the changed one: here every row is made to
// keep block 0, as "attention sink" methods do, in place of the least recent block that it chose.
#include <moba/moba.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

namespace {

constexpr std::int64_t kTokens = 1000, kQueryHeads = 4, kKeyHeads = 2, kHeadDim = 32;

std::vector<float> made_up(std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  return values;
}

void print_ids(const char* what, const std::int32_t* ids, const moba::Plan& plan) {
  for (std::int64_t head = 0; head < kQueryHeads; ++head) {
    std::printf("%s, last token, head %d:", what, static_cast<int>(head));
    const std::int32_t* row = ids + ((kTokens - 1) * kQueryHeads + head) * plan.slots();
    for (std::int64_t slot = 0; slot < plan.slots() && row[slot] >= 0; ++slot) std::printf(" %d", row[slot]);
    std::printf("\n");
  }
}

int run() {
  moba::Problem problem;
  problem.q_heads = kQueryHeads;
  problem.kv_heads = kKeyHeads;
  problem.head_dim = kHeadDim;
  problem.total_q = problem.total_k = kTokens;
  problem.config.block_size = 50;
  problem.config.top_k = 5;
  const moba::Plan plan(problem);
  std::vector<std::byte> workspace(plan.workspace_bytes());

  const std::vector<float> q = made_up(kTokens * kQueryHeads * kHeadDim, 1);
  const std::vector<float> k = made_up(kTokens * kKeyHeads * kHeadDim, 2);
  const std::vector<float> v = made_up(kTokens * kKeyHeads * kHeadDim, 3);
  moba::Inputs inputs;
  inputs.q = moba::ConstTensor(q.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim});
  inputs.k = moba::ConstTensor(k.data(), moba::DType::f32, {kTokens, kKeyHeads, kHeadDim});
  inputs.v = moba::ConstTensor(v.data(), moba::DType::f32, {kTokens, kKeyHeads, kHeadDim});

  std::vector<std::byte> memory(plan.selection_bytes());
  const moba::Selection selection = moba::make_selection(plan, memory);
  moba::select(plan, inputs, selection, workspace);

  // ids [Tq, Hq, slots]: per row the chosen blocks in ascending order, then -1.
  auto* ids = static_cast<std::int32_t*>(selection.ids.data);
  print_ids("chosen", ids, plan);

  // The transpose: the rows that chose a block, per key head. How many there are is the work that the block makes.
  const auto* offsets = static_cast<const std::int64_t*>(selection.offsets.data);
  const std::int64_t blocks = plan.max_blocks();
  for (std::int64_t head = 0; head < kKeyHeads; ++head) {
    std::printf("rows per block, key head %d:", static_cast<int>(head));
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t at = head * blocks + block;
      std::printf(" %d", static_cast<int>(offsets[at + 1] - offsets[at]));
    }
    std::printf("\n");
  }

  std::vector<float> out(q.size()), sunk(q.size()), lse(kQueryHeads * kTokens);
  moba::Outputs outputs;
  outputs.out = moba::Tensor(out.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim});
  outputs.lse = moba::Tensor(lse.data(), moba::DType::f32, {kQueryHeads, kTokens});
  moba::attend(plan, inputs, selection, outputs, workspace);

  // A selection of one's own: write ids, then call index, which checks them and makes the transpose.
  for (std::int64_t row = 0; row < kTokens * kQueryHeads; ++row)
    ids[row * plan.slots()] = 0;  // the first is the lowest
  moba::index(plan, inputs, selection, workspace);
  print_ids("with block 0", ids, plan);
  outputs.out = moba::Tensor(sunk.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim});
  moba::attend(plan, inputs, selection, outputs, workspace);

  // While a row has chosen every block it can see (block 0 among them), nothing changes for it.
  const std::size_t early =
      static_cast<std::size_t>(problem.config.top_k * problem.config.block_size) * kQueryHeads * kHeadDim;
  float early_change = 0, late_change = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    float& change = i < early ? early_change : late_change;
    change = std::fmax(change, std::fabs(out[i] - sunk[i]));
  }
  std::printf("largest change: first %d tokens %g, the rest %g\n",
              static_cast<int>(problem.config.top_k * problem.config.block_size), static_cast<double>(early_change),
              static_cast<double>(late_change));
  return early_change < 1e-6f && late_change > 1e-3f ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "inspect_selection: %s\n", error.what());
    return 1;
  }
}
