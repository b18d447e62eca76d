// Strides of dimensions that are never stepped over: whatever they say changes nothing.
#include <algorithm>
#include <limits>
#include <optional>

#include "support.h"

namespace moba::test {
namespace {

// A problem whose tensors have as many dimensions of one element as can be, and all results of it, with the strides of
// these dimensions as they are or anything.
std::vector<std::uint64_t> results_with(const Case& c, const Options& options, std::optional<std::int64_t> anything) {
  const auto spoil = [&](auto tensor) {
    for (int i = 0; i < tensor.rank && anything; ++i) {
      if (tensor.shape[i] == 1) tensor.stride[i] = *anything;
    }
    return tensor;
  };
  const Data data(c);
  Array cos(DType::f32, {std::max<std::int64_t>(c.total_k(), 1), 1}), sin = cos;
  cos.fill(8);
  sin.fill(9);
  Problem problem = c.problem();
  problem.rope =
      Rope{.rotary_dim = 2, .cos = spoil(std::as_const(cos).tensor()), .sin = spoil(std::as_const(sin).tensor())};
  const Plan plan(problem, options);
  std::vector<std::byte> workspace(plan.workspace_bytes());
  const Inputs plain = data.inputs();
  const Inputs inputs{spoil(plain.q), spoil(plain.k), spoil(plain.v), spoil(plain.cu_seqlens_q),
                      spoil(plain.cu_seqlens_k)};
  std::vector<std::uint64_t> all;
  const auto keep = [&](const std::vector<std::uint64_t>& bits) { all.insert(all.end(), bits.begin(), bits.end()); };
  Attention result(plan.problem()), merged(plan.problem());
  const Outputs outputs{spoil(result.out.tensor()), spoil(result.lse.tensor())};
  forward(plan, inputs, outputs, workspace);
  keep(result.bits());
  dense(plan, inputs, outputs, workspace);
  keep(result.bits());
  Array q(c.dtype, {c.total_q(), c.q_heads, c.head_dim}), k(c.dtype, {c.total_k(), c.kv_heads, c.head_dim});
  rope(plan, inputs, spoil(q.tensor()), spoil(k.tensor()), workspace);
  keep(q.bits());
  keep(k.bits());
  Array centroids(c.dtype, {plan.max_blocks(), c.kv_heads, c.head_dim});
  pool(plan, inputs, spoil(centroids.tensor()), workspace);
  keep(centroids.bits());
  Chosen chosen(plan);
  const Selection own = chosen.selection();
  const Selection selection{spoil(own.ids), spoil(own.counts), spoil(own.offsets), spoil(own.rows)};
  gate(plan, inputs, spoil(centroids.tensor()), selection, workspace);
  keep(chosen.ids.bits());
  index(plan, inputs, selection, workspace);
  keep(chosen.offsets.bits());
  select(plan, inputs, selection, workspace);
  keep(chosen.counts.bits());
  attend(plan, inputs, selection, outputs, workspace);
  keep(result.bits());
  const Outputs partials[] = {outputs, outputs};
  merge(plan, partials, {spoil(merged.out.tensor()), spoil(merged.lse.tensor())});
  keep(merged.bits());
  return all;
}

// Strides of dimensions of one element, or of none, mean nothing.
TEST(Strides, ThatMeanNothingMayBeAnything) {
  const std::vector<Case> cases{
      {.name = "one query", .q_heads = 1, .head_dim = 8, .q_lengths = {1}, .k_lengths = {40}},
      {.name = "one of all", .q_heads = 1, .head_dim = 8, .q_lengths = {1}, .k_lengths = {1}},
      {.name = "one query for each of two heads", .q_heads = 2, .head_dim = 9, .q_lengths = {1}, .k_lengths = {40}},
      {.name = "one head", .q_heads = 1, .head_dim = 9, .q_lengths = {70}, .k_lengths = {70}},
      {.name = "one block",
       .q_heads = 1,
       .head_dim = 8,
       .q_lengths = {1, 0},
       .k_lengths = {3, 0},
       .config = {.block_size = 50, .top_k = 1}}};
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  for (Case c : cases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      c.dtype = dtype;
      std::vector<Options> all = cpu_kernels(dtype);
      all.push_back(reference_options());
      for (const Options& options : all) {
        const auto expected = results_with(c, options, std::nullopt);
        for (const std::int64_t anything : {kMost / 2, kMost, -kMost - 1, std::int64_t{-77}, std::int64_t{0}}) {
          EXPECT_TRUE(results_with(c, options, anything) == expected)
              << c << ", " << describe(options) << ", " << anything;
        }
      }
    }
  }
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {0}, .k_lengths = {20}};
  const Data data(c);
  const Plan plan(c.problem());
  std::vector<std::byte> workspace(plan.workspace_bytes());
  Inputs inputs = data.inputs();
  inputs.q = ConstTensor(nullptr, DType::f32, {0, 1, 8});
  const Outputs outputs{Tensor(nullptr, DType::f32, {0, 1, 8}), Tensor(nullptr, DType::f32, {1, 0})};
  EXPECT_NO_THROW(forward(plan, inputs, outputs, workspace));
}

// A tensor that a function does not read is not looked at, however little sense it makes.
TEST(Strides, TensorsThatAreNotReadMayBeAnything) {
  Tensor nonsense;
  nonsense.rank = 1 << 20;
  nonsense.shape = {-1, 1, 0, 1};
  Case c;
  const Data data(c);
  Runner run(c.problem(), {});
  const Array centroids = run.pool(data.inputs());
  const Chosen chosen = run.select(data.inputs());
  Inputs inputs = data.inputs();
  inputs.q = inputs.v = nonsense;
  EXPECT_EQ(run.pool(inputs).bits(), centroids.bits());
  Chosen again(run.plan());
  again.ids = chosen.ids;
  inputs.k = nonsense;
  run.index(inputs, again);
  EXPECT_EQ(again.transpose(), chosen.transpose());
  inputs.q = data.inputs().q;
  std::vector<std::byte> workspace(run.plan().workspace_bytes());
  again.ids = Array(DType::i32, {64, 2, run.plan().slots()});
  const Selection ids_only{again.ids.tensor(), again.counts.tensor(), {}, nonsense};
  gate(run.plan(), inputs, centroids.tensor(), ids_only, workspace);
  EXPECT_EQ(again.ids.bits(), chosen.ids.bits());
}

}  // namespace
}  // namespace moba::test
