// Plan: what it says of memory, blocks and arithmetic is true; and calls stay within the memory that they are given.
#include <algorithm>
#include <limits>
#include <numeric>

#include "support.h"

namespace moba::test {
namespace {

std::vector<std::int64_t> cu_of(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> cu{0};
  for (const std::int64_t length : lengths) cu.push_back(cu.back() + length);
  return cu;
}

std::int64_t blocks_of(std::int64_t length, std::int64_t block_size) { return (length + block_size - 1) / block_size; }

TEST(Plan, FillsInDefaults) {
  Problem p{.q_heads = 4, .kv_heads = 2, .head_dim = 64, .total_q = 100, .total_k = 300};
  p.rope = Rope{};
  const Plan plan(p);
  EXPECT_EQ(plan.problem().max_seqlen_q, 100);
  EXPECT_EQ(plan.problem().max_seqlen_k, 300);
  EXPECT_EQ(plan.problem().config.scale, 0.125);
  EXPECT_EQ(plan.problem().rope->rotary_dim, 64);
  EXPECT_GE(plan.threads(), 1);
  EXPECT_EQ(Plan(p, {.threads = 7}).threads(), 7);
  EXPECT_EQ(Plan(p, reference_options()).threads(), 1);
}

TEST(Plan, SlotsAndBlocks) {
  const auto plan = [](std::int64_t batch, std::int64_t total_k, std::int64_t longest, std::int64_t block_size,
                       std::int64_t k) {
    return Plan({.batch = batch,
                 .total_q = 10,
                 .total_k = total_k,
                 .max_seqlen_k = longest,
                 .config = {.block_size = block_size, .top_k = k}});
  };
  EXPECT_EQ(plan(1, 100, 0, 10, 3).slots(), 3);
  EXPECT_EQ(plan(1, 100, 0, 10, 10).slots(), 10);
  EXPECT_EQ(plan(1, 101, 0, 10, 100).slots(), 11);
  EXPECT_EQ(plan(4, 100, 25, 10, 100).slots(), 3);
  EXPECT_EQ(plan(1, 0, 0, 10, 100).slots(), 1);
  EXPECT_EQ(plan(1, 100, 0, 10, 3).max_blocks(), 10);
  EXPECT_EQ(plan(1, 101, 0, 10, 3).max_blocks(), 11);
  EXPECT_EQ(plan(1, 0, 0, 10, 3).max_blocks(), 0);
  EXPECT_EQ(plan(3, 2, 0, 10, 3).max_blocks(), 2);
  EXPECT_EQ(plan(2, 100, 0, 1, 3).max_blocks(), 100);
}

// forward selects, or is full attention: settled by the longest sequence that the plan allows, before any call.
TEST(Plan, ForwardIsSettledInThePlan) {
  const auto plan_of = [](std::int64_t longest, const Options& options) {
    return Plan({.q_heads = 8,
                 .head_dim = 8,
                 .batch = 1 << 14,
                 .total_q = 1 << 20,
                 .total_k = 1 << 20,
                 .max_seqlen_k = longest,
                 .config = {.block_size = 50, .top_k = 2}},
                options);
  };
  for (const Options& options : {reference_options(), Options{.threads = 2}}) {
    const Plan all = plan_of(100, options), some = plan_of(101, options);
    EXPECT_LT(all.workspace_bytes(), all.selection_bytes() / 2);
    EXPECT_GT(some.workspace_bytes(), some.selection_bytes());
  }
  EXPECT_NE(plan_of(100, {}).kernels().find("full attention"), std::string::npos);
  EXPECT_EQ(plan_of(101, {}).kernels().find("full attention"), std::string::npos);

  // Two sequences all of whose blocks are chosen, in a plan that allows longer ones.
  Case c{.head_dim = 32, .q_lengths = {100, 90}, .k_lengths = {100, 90}, .config = {.block_size = 50, .top_k = 2}};
  const Data data(c);
  for (const Options& options : cpu_kernels(c.dtype)) {
    Runner full(c.problem(), options);
    EXPECT_EQ(full.forward(data.inputs()).bits(), full.dense(data.inputs()).bits());
    Problem longer = c.problem();
    longer.max_seqlen_k = 101;
    Runner run(longer, options);
    Chosen chosen = run.select(data.inputs());
    EXPECT_EQ(run.forward(data.inputs()).bits(), run.attend(data.inputs(), chosen).bits());
  }
}

// As large as an int64 can be: more than any sequence has.
TEST(Plan, HugeBlocksAndTopK) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  struct Huge {
    std::int64_t block_size, top_k;
  };
  for (const bool causal : {true, false}) {
    for (const auto& [block_size, top_k] : {Huge{kMost, kMost}, {kMost, 1}, {kMost - 1, 2}, {20, kMost}, {1, kMost}}) {
      Case c{
          .q_lengths = {50}, .k_lengths = {70}, .config = {.block_size = block_size, .top_k = top_k, .causal = causal}};
      const Data data(c);
      for (const Options& options : {reference_options(), Options{.threads = 2}}) {
        Runner run(c.problem(), options);
        EXPECT_EQ(run.plan().max_blocks(), block_size > 70 ? 1 : (70 + block_size - 1) / block_size);
        Chosen chosen = run.select(data.inputs());
        EXPECT_TRUE(well_formed(c, chosen));
        EXPECT_TRUE(close(run.attend(data.inputs(), chosen), dense_f64(run, data.inputs()), c.dtype));
        EXPECT_TRUE(close(run.forward(data.inputs()), dense_f64(run, data.inputs()), c.dtype));
        EXPECT_EQ(run.plan().arithmetic().attend, run.plan().arithmetic().dense);
      }
    }
  }
  // Packed: a huge block is one of each sequence.
  Case c{.q_lengths = {50, 0, 3, 1}, .k_lengths = {70, 4, 0, 1}, .config = {.block_size = kMost, .top_k = kMost}};
  const Data data(c);
  for (const Options& options : {reference_options(), Options{.threads = 2}}) {
    Runner run(c.problem(), options);
    Chosen chosen = run.select(data.inputs());
    EXPECT_TRUE(well_formed(c, chosen));
    EXPECT_TRUE(close(run.attend(data.inputs(), chosen), dense_f64(run, data.inputs()), c.dtype));
    EXPECT_TRUE(close(run.forward(data.inputs()), dense_f64(run, data.inputs()), c.dtype));
  }
}

TEST(Plan, MaxBlocksHoldsForEveryBatch) {
  Random random(1);
  for (int i = 0; i < 3000; ++i) {
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(random.integer(1, 8)));
    for (std::int64_t& length : lengths) length = random.one_in(3) ? random.integer(0, 2) : random.integer(0, 40);
    const std::int64_t block_size = random.integer(1, 12);
    Problem p{.batch = std::ssize(lengths),
              .total_k = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0})};
    p.config.block_size = block_size;
    std::int64_t blocks = 0;
    for (const std::int64_t length : lengths) blocks += blocks_of(length, block_size);
    ASSERT_LE(blocks, Plan(p).max_blocks());
    if (lengths.size() == 1) {
      ASSERT_EQ(blocks, Plan(p).max_blocks());
    }
  }
  // One sequence of all but one-token others: the bound is met.
  Problem p{.batch = 4, .total_k = 33, .config = {.block_size = 10}};
  EXPECT_EQ(Plan(p).max_blocks(), blocks_of(30, 10) + 3);
}

TEST(Plan, ArithmeticIsWhatCountingGives) {
  Random random(2);
  for (int i = 0; i < 300; ++i) {
    Case c{.q_heads = 6, .kv_heads = random.one_in(2) ? 2 : 3, .head_dim = random.integer(8, 64)};
    c.q_lengths.resize(static_cast<std::size_t>(random.integer(1, 4)));
    c.k_lengths.resize(c.q_lengths.size());
    for (std::int64_t& length : c.q_lengths) length = random.integer(0, 40);
    for (std::int64_t& length : c.k_lengths) length = random.integer(0, 40);
    c.config = {.block_size = random.integer(1, 15), .top_k = random.integer(1, 6), .causal = random.one_in(2)};
    const std::int64_t b = c.config.block_size, k = c.config.top_k;
    double pairs = 0, all_pairs = 0, scores = 0;
    for (std::size_t s = 0; s < c.q_lengths.size(); ++s) {
      const std::int64_t blocks = blocks_of(c.k_lengths[s], b);
      for (std::int64_t q = 0; q < c.q_lengths[s]; ++q) {
        const std::int64_t position = c.k_lengths[s] - c.q_lengths[s] + q;
        if (!c.config.causal) {
          pairs += static_cast<double>(std::min(std::min(k, blocks) * b, c.k_lengths[s]));
          all_pairs += static_cast<double>(c.k_lengths[s]);
          scores += static_cast<double>(blocks);
        } else if (position >= 0) {
          pairs += static_cast<double>(std::min(k - 1, position / b) * b + position % b + 1);
          all_pairs += static_cast<double>(position + 1);
          scores += static_cast<double>(position / b);
        }
      }
    }
    const Plan plan(c.problem());
    const Arithmetic got = plan.arithmetic(cu_of(c.q_lengths), cu_of(c.k_lengths));
    const double d = static_cast<double>(c.head_dim);
    EXPECT_EQ(got.pairs, 6 * pairs) << c;
    EXPECT_EQ(got.attend, 4 * d * 6 * pairs) << c;
    EXPECT_EQ(got.dense, 4 * d * 6 * all_pairs) << c;
    EXPECT_EQ(got.backward, 10 * d * 6 * pairs) << c;
    EXPECT_EQ(got.dense_backward, 10 * d * 6 * all_pairs) << c;
    EXPECT_EQ(got.gate, 2 * d * 6 * scores) << c;
    EXPECT_EQ(got.pool, static_cast<double>(c.total_k() * c.kv_heads) * d) << c;
    if (c.q_lengths.size() == 1) {
      EXPECT_EQ(plan.arithmetic().pairs, got.pairs);
    }
  }
}

TEST(Plan, SaysWhichKernels) {
  Problem p{.dtype = DType::bf16, .total_q = 10, .total_k = 10, .config = {.block_size = 2, .top_k = 3}};
  EXPECT_EQ(Plan(p, reference_options()).kernels(), "reference, float64, 1 thread");
  ASSERT_FALSE(cpu_targets().empty());
  EXPECT_NE(Plan(p).kernels().find("cpu " + cpu_targets().front()), std::string::npos) << "the best one by default";
  for (const Options& options : cpu_kernels(DType::bf16, 3)) {
    const std::string kernels = Plan(p, options).kernels();
    const std::string products =
        options.bf16_products == Bf16Products::dot ? ", bfloat16 pair products" : ", float32 products";
    EXPECT_EQ(kernels, "cpu " + options.cpu_target + products + ", 3 threads");
  }
  Options automatic;
  automatic.threads = 1;
  const bool pairs = Plan(p, automatic).kernels().find("pair products") != std::string::npos;
  EXPECT_EQ(pairs, bf16_support().preferred);
  EXPECT_TRUE(bf16_support().available || !bf16_support().preferred);
  p.config.top_k = 5;  // every block
  EXPECT_NE(Plan(p).kernels().find("full attention"), std::string::npos);
}

TEST(Plan, CopiesStandAlone) {
  Case c{.q_lengths = {100}, .k_lengths = {100}, .rope = Rope{}};
  const Data data(c);
  std::optional<Plan> first(std::in_place, c.problem(), Options{.threads = 2});
  Attention expected(first->problem()), got(first->problem());
  std::vector<std::byte> workspace(first->workspace_bytes());
  forward(*first, data.inputs(), expected.outputs(), workspace);
  std::vector<Plan> plans{*first};
  first.reset();
  forward(plans[0], data.inputs(), got.outputs(), workspace);
  EXPECT_EQ(got.bits(), expected.bits());
  Plan assigned(Problem{.total_q = 1, .total_k = 1});
  assigned = plans[0];
  const Plan& same = assigned;
  assigned = same;
  const Plan taken = std::move(plans[0]);  // NOLINT: there is no move, so the one taken from goes on
  for (const Plan* plan : std::initializer_list<const Plan*>{&assigned, &taken, &plans[0]}) {
    forward(*plan, data.inputs(), got.outputs(), workspace);
    EXPECT_EQ(got.bits(), expected.bits());
    EXPECT_EQ(plan->kernels(), taken.kernels());
  }
}

// workspace_bytes() of memory at any address, between guards, for every function.
TEST(Plan, CallsStayWithinTheWorkspace) {
  Rope rope;
  std::vector<Case> cases{
      {.name = "small", .q_lengths = {3}, .k_lengths = {5}, .rope = rope},
      {.name = "gate",
       .q_heads = 5,
       .head_dim = 40,
       .q_lengths = {60},
       .k_lengths = {900},
       .config = {.block_size = 1, .top_k = 300}},
      {.name = "long", .q_heads = 4, .kv_heads = 2, .q_lengths = {1300}, .k_lengths = {1300}, .rope = rope},
      {.name = "group", .q_heads = 700, .head_dim = 9, .q_lengths = {3}, .k_lengths = {20}},
      {.name = "packed",
       .dtype = DType::bf16,
       .head_dim = 33,
       .q_lengths = {70, 0, 1, 200},
       .k_lengths = {70, 9, 1, 30}},
      {.name = "nothing", .q_lengths = {0}, .k_lengths = {0}}};
  for (const Case& c : cases) {
    const Data data(c);
    for (const Options& options : cpu_kernels(c.dtype, 3)) {
      const Plan plan(c.problem(), options);
      const std::size_t bytes = plan.workspace_bytes();
      for (const std::size_t start : {64, 65, 127}) {
        SCOPED_TRACE(::testing::Message() << c << ", " << describe(options) << ", workspace at " << start);
        struct alignas(64) Line {
          std::byte bytes[64];
        };
        std::vector<Line> lines((bytes + start + 64) / 64 + 1);
        const std::span<std::byte> memory(reinterpret_cast<std::byte*>(lines.data()), lines.size() * 64);
        std::ranges::fill(memory, std::byte{0xa5});
        const Workspace workspace = memory.subspan(start, bytes);
        Attention result(plan.problem());
        Chosen chosen(plan);
        Array centroids(c.dtype, {plan.max_blocks(), c.kv_heads, c.head_dim});
        forward(plan, data.inputs(), result.outputs(), workspace);
        dense(plan, data.inputs(), result.outputs(), workspace);
        pool(plan, data.inputs(), centroids.tensor(), workspace);
        gate(plan, data.inputs(), centroids.tensor(), chosen.selection(), workspace);
        index(plan, data.inputs(), chosen.selection(), workspace);
        select(plan, data.inputs(), chosen.selection(), workspace);
        attend(plan, data.inputs(), chosen.selection(), result.outputs(), workspace);
        if (c.rope) {
          Array q(c.dtype, {c.total_q(), c.q_heads, c.head_dim}), k(c.dtype, {c.total_k(), c.kv_heads, c.head_dim});
          moba::rope(plan, data.inputs(), q.tensor(), k.tensor(), workspace);
          ASSERT_TRUE(q.surroundings_untouched() && k.surroundings_untouched());
        }
        ASSERT_TRUE(result.surroundings_untouched() && chosen.surroundings_untouched() &&
                    centroids.surroundings_untouched());
        const auto untouched = [](std::byte b) { return b == std::byte{0xa5}; };
        ASSERT_TRUE(std::ranges::all_of(memory.first(start), untouched));
        ASSERT_TRUE(std::ranges::all_of(memory.subspan(start + bytes), untouched));
        if (kSanitized) break;
      }
    }
  }
}

TEST(Plan, WorkspaceContentDoesNotMatter) {
  for (const std::int64_t d : {34, 33}) {  // even: with rope; odd: bfloat16 pairs are completed
    Case c{.dtype = DType::bf16,
           .q_heads = 4,
           .kv_heads = 2,
           .head_dim = d,
           .q_lengths = {100, 40},
           .k_lengths = {300, 40}};
    if (d % 2 == 0) c.rope = Rope{};
    const Data data(c);
    for (const Options& options : cpu_kernels(c.dtype)) {
      const Plan plan(c.problem(), options);
      std::vector<std::uint64_t> seen;
      for (const int content : {0, 0xff, 0x7f}) {
        std::vector<std::byte> workspace(plan.workspace_bytes(), static_cast<std::byte>(content));
        Attention result(plan.problem());
        forward(plan, data.inputs(), result.outputs(), workspace);
        if (seen.empty()) seen = result.bits();
        EXPECT_EQ(result.bits(), seen) << describe(options) << ", " << content;
      }
    }
  }
}

// Where the gate is what takes most scratch, it stays clear of the centroids that select keeps behind it. Several
// tasks: each reads the centroids once more.
TEST(Plan, ScratchOfTheGate) {
  Case c{.q_heads = 1,
         .head_dim = 8,
         .q_lengths = {2100},
         .k_lengths = {4000},
         .config = {.block_size = 1, .top_k = 1000}};
  const Data data(c);
  for (const Options& options : cpu_kernels(c.dtype, 1)) {
    Runner run(c.problem(), options);
    const Chosen expected = run.gate(data.inputs(), run.pool(data.inputs()));
    EXPECT_TRUE(run.select(data.inputs()).ids.bits() == expected.ids.bits()) << describe(options);
  }
}

TEST(Tensor, StridesOfItsOwn) {
  float data[64];
  const Tensor t(data, DType::f32, {4, 2, 8}, {8, 32, 1}, Device::cuda, 3);
  EXPECT_EQ(t.rank, 3);
  EXPECT_EQ(t.stride[0], 8);
  EXPECT_EQ(t.stride[1], 32);
  EXPECT_EQ(t.stride[2], 1);
  EXPECT_EQ(t.device, Device::cuda);
  EXPECT_EQ(t.device_index, 3);
  EXPECT_THROW(Tensor(data, DType::f32, {4, 2, 8}, {8, 1}), Error);
}

TEST(Tensor, ContiguousStrides) {
  float x = 0;
  const Tensor t(&x, DType::f32, {2, 3, 4});
  EXPECT_EQ(t.stride[0], 12);
  EXPECT_EQ(t.stride[1], 4);
  EXPECT_EQ(t.stride[2], 1);
  EXPECT_EQ(moba::describe(t), "f32 [2, 3, 4]");
  EXPECT_FALSE(ConstTensor().given());
  EXPECT_THROW(Tensor(&x, DType::f32, {1, 1, 1, 1, 1}), Error);
  constexpr std::int64_t kLarge = std::int64_t{1} << 40;
  EXPECT_THROW(Tensor(&x, DType::f32, {kLarge, kLarge}), Error);
}

}  // namespace
}  // namespace moba::test
