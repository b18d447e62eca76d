// attend, dense and forward of every cpu kernel against float64.
#include <algorithm>
#include <cmath>

#include "support.h"

namespace moba::test {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// Small, for the reference and the brute force; every rule of the mask and the selection is in here.
std::vector<Case> small_cases() {
  std::vector<Case> all;
  for (const bool causal : {true, false}) {
    const Config config{.block_size = 4, .top_k = 2, .causal = causal};
    all.push_back({.name = "one sequence",
                   .q_heads = 4,
                   .kv_heads = 2,
                   .head_dim = 8,
                   .q_lengths = {23},
                   .k_lengths = {23},
                   .config = config});
    all.push_back({.name = "lengths",
                   .head_dim = 9,
                   .q_lengths = {5, 9, 0, 3, 1, 4},
                   .k_lengths = {17, 3, 5, 0, 1, 12},
                   .config = config});
    all.push_back(
        {.name = "bf16", .dtype = DType::bf16, .head_dim = 8, .q_lengths = {20}, .k_lengths = {30}, .config = config});
    all.push_back({.name = "scale",
                   .head_dim = 8,
                   .q_lengths = {20},
                   .k_lengths = {20},
                   .config = {.block_size = 3, .top_k = 3, .causal = causal, .scale = -0.7}});
  }
  return all;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : kTypes) {
    const auto add = [&](Case c) {
      c.dtype = dtype;
      all.push_back(c);
    };
    for (const std::int64_t d : {8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 80, 100, 127, 128, 129, 192, 255, 256}) {
      add({.name = "dim " + std::to_string(d),
           .head_dim = d,
           .q_lengths = {75},
           .k_lengths = {75},
           .inputs = {.tight = true},
           .outputs = {.tight = true}});
    }
    for (const std::int64_t b : {1, 2, 3, 15, 17, 48, 100, 127, 128, 129, 130, 200, 300, 1000}) {
      add({.name = "block " + std::to_string(b),
           .head_dim = 20,
           .q_lengths = {291},
           .k_lengths = {291},
           .config = {.block_size = b, .top_k = 2}});
      add({.name = "block " + std::to_string(b) + " not causal",
           .head_dim = 20,
           .q_lengths = {60},
           .k_lengths = {291},
           .config = {.block_size = b, .top_k = 2, .causal = false}});
    }
    for (const auto& [q_heads, kv_heads] : {std::pair{1, 1}, {4, 4}, {3, 1}, {9, 3}, {8, 2}, {71, 1}}) {
      add({.name = "heads " + std::to_string(q_heads) + " on " + std::to_string(kv_heads),
           .q_heads = q_heads,
           .kv_heads = kv_heads,
           .head_dim = 24,
           .q_lengths = {100},
           .k_lengths = {100}});
    }
    add({.name = "group above the rows of a task",
         .q_heads = 1500,
         .head_dim = 8,
         .q_lengths = {5},
         .k_lengths = {40},
         .config = {.block_size = 7, .top_k = 2}});
    for (const std::int64_t k : {1, 2, 5, 18, 19, 100}) {
      add({.name = "top " + std::to_string(k),
           .head_dim = 40,
           .q_lengths = {299},
           .k_lengths = {299},
           .config = {.block_size = 16, .top_k = k}});
    }
    for (const bool causal : {true, false}) {
      const Config config{.block_size = 32, .top_k = 3, .causal = causal};
      const std::string end = causal ? "" : " not causal";
      add({.name = "one token" + end, .q_lengths = {1}, .k_lengths = {1}, .config = config});
      add({.name = "one query of many keys" + end,
           .q_heads = 3,
           .q_lengths = {1},
           .k_lengths = {400},
           .config = config});
      add({.name = "few queries" + end, .q_heads = 3, .q_lengths = {37}, .k_lengths = {300}, .config = config});
      add({.name = "more queries than keys" + end, .q_lengths = {150}, .k_lengths = {70}, .config = config});
      add({.name = "no keys" + end, .q_lengths = {5}, .k_lengths = {0}, .config = config});
      add({.name = "no queries" + end, .q_lengths = {0}, .k_lengths = {50}, .config = config});
      add({.name = "nothing" + end, .q_lengths = {0}, .k_lengths = {0}, .config = config});
      add({.name = "no batch" + end, .q_lengths = {}, .k_lengths = {}, .config = config});
      add({.name = "packed" + end,
           .q_heads = 4,
           .kv_heads = 2,
           .head_dim = 40,
           .q_lengths = {0, 1, 200, 33, 1, 90, 4, 3, 130},
           .k_lengths = {0, 1, 200, 150, 140, 60, 0, 2, 130},
           .config = config,
           .inputs = {.gap = 1, .offset = 1},
           .outputs = {.gap = 3, .offset = 5}});
      add({.name = "strides" + end,
           .q_heads = 6,
           .kv_heads = 3,
           .head_dim = 33,
           .q_lengths = {120},
           .k_lengths = {140},
           .config = config,
           .inputs = {.gap = 7, .swapped = true, .offset = 3},
           .outputs = {.gap = 2, .swapped = true, .offset = 1}});
      for (const double scale : {0.0, -0.25, 1.5}) {
        add({.name = "scale " + std::to_string(scale) + end,
             .q_lengths = {100},
             .k_lengths = {100},
             .config = {.block_size = 32, .top_k = 2, .causal = causal, .scale = scale}});
      }
    }
    add({.name = "long",
         .q_heads = 4,
         .kv_heads = 2,
         .head_dim = 32,
         .q_lengths = {1100},
         .k_lengths = {1300},
         .config = {.block_size = 64, .top_k = 3}});
  }
  return all;
}

class SmallCases : public ::testing::TestWithParam<Case> {};

TEST_P(SmallCases, ReferenceFollowsTheSpec) {
  const Case& c = GetParam();
  const Data data(c);
  Runner run(c.problem(), reference_options());
  Chosen gated = run.select(data.inputs());
  for (const int choice : {0, 1, 2}) {  // gate's, any, any shared by the heads of a key head
    Chosen any(run.plan(), {}, choice == 2);
    choose_anything(c, any, c.seed);
    if (choice > 0) run.index(data.inputs(), any);
    Chosen& chosen = choice == 0 ? gated : any;
    const reference::Rows by_hand = brute_force(c, data, &chosen), got = attend_f64(run, data.inputs(), chosen);
    for (std::size_t i = 0; i < got.out.size(); ++i) ASSERT_NEAR(got.out[i], by_hand.out[i], 1e-12);
    for (std::size_t i = 0; i < got.lse.size(); ++i) {
      ASSERT_TRUE(got.lse[i] == by_hand.lse[i] || std::abs(got.lse[i] - by_hand.lse[i]) < 1e-12)
          << got.lse[i] << " " << by_hand.lse[i];
    }
    EXPECT_TRUE(close(run.attend(data.inputs(), chosen), by_hand, c.dtype));
  }
  const reference::Rows by_hand = brute_force(c, data, nullptr), got = dense_f64(run, data.inputs());
  for (std::size_t i = 0; i < got.out.size(); ++i) ASSERT_NEAR(got.out[i], by_hand.out[i], 1e-12);
  EXPECT_TRUE(close(run.dense(data.inputs()), by_hand, c.dtype));
  EXPECT_TRUE(close(run.forward(data.inputs()), brute_force(c, data, &gated), c.dtype));
}

INSTANTIATE_TEST_SUITE_P(Attend, SmallCases, ::testing::ValuesIn(small_cases()), case_name);

class AttendCases : public ::testing::TestWithParam<Case> {};

TEST_P(AttendCases, ForwardIsCloseToFloat64) {
  const Case& c = GetParam();
  const Data data(c);
  Runner reference(c.problem(), reference_options());
  Chosen expected = reference.select(data.inputs());
  const reference::Rows rows = attend_f64(reference, data.inputs(), expected);
  for (const Options& options : cpu_kernels(c.dtype)) {
    SCOPED_TRACE(describe(options));
    Runner run(c.problem(), options);
    const Attention got = run.forward(data.inputs(), c.outputs);
    EXPECT_TRUE(got.surroundings_untouched());
    Chosen chosen = run.select(data.inputs());
    if (chosen.ids.bits() == expected.ids.bits()) {
      EXPECT_TRUE(close(got, rows, c.dtype));
    } else {  // a near tie: the choice is judged by the tests of the gate
      EXPECT_TRUE(close(got, attend_f64(reference, data.inputs(), chosen), c.dtype));
    }
    const auto blocks_of = [&](std::int64_t length) {
      return (length + c.config.block_size - 1) / c.config.block_size;
    };
    const bool all =
        std::ranges::all_of(c.k_lengths, [&](std::int64_t length) { return blocks_of(length) <= c.config.top_k; });
    // Choosing everything is full attention; else the stages on their own give what forward gives.
    EXPECT_EQ(got.bits(), all ? run.dense(data.inputs()).bits() : run.attend(data.inputs(), chosen).bits());
  }
}

TEST_P(AttendCases, DenseIsCloseToFloat64) {
  const Case& c = GetParam();
  const Data data(c);
  Runner reference(c.problem(), reference_options());
  const reference::Rows expected = dense_f64(reference, data.inputs());
  for (const Options& options : cpu_kernels(c.dtype)) {
    SCOPED_TRACE(describe(options));
    const Attention got = Runner(c.problem(), options).dense(data.inputs(), c.outputs);
    EXPECT_TRUE(close(got, expected, c.dtype));
    EXPECT_TRUE(got.surroundings_untouched());
  }
}

TEST_P(AttendCases, AnySelectionIsCloseToFloat64) {
  const Case& c = GetParam();
  const Data data(c);
  Runner reference(c.problem(), reference_options());
  for (const bool shared : {false, true}) {
    Chosen chosen(reference.plan(), {}, shared);
    choose_anything(c, chosen, 5);
    reference.index(data.inputs(), chosen);
    const reference::Rows expected = attend_f64(reference, data.inputs(), chosen);
    for (const Options& options : cpu_kernels(c.dtype)) {
      SCOPED_TRACE(describe(options));
      const Attention got = Runner(c.problem(), options).attend(data.inputs(), chosen, c.outputs);
      EXPECT_TRUE(close(got, expected, c.dtype));
      EXPECT_TRUE(got.surroundings_untouched());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Attend, AttendCases, ::testing::ValuesIn(cases()), case_name);

// k B >= length: every row chooses all that it may see, so attention over the selection is dense attention bit for bit
// where blocks end where tiles of 128 keys do, and to rounding elsewhere.
TEST(Attend, OverEveryBlockIsDense) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t b : {128, 16, 50}) {
      Case c{.dtype = dtype,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = 64,
             .q_lengths = {300},
             .k_lengths = {300},
             .config = {.block_size = b, .top_k = 20}};
      const Data data(c);
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(describe(options));
        Runner run(c.problem(), options);
        Chosen chosen = run.select(data.inputs());
        const Attention dense = run.dense(data.inputs()), attend = run.attend(data.inputs(), chosen);
        EXPECT_EQ(run.forward(data.inputs()).bits(), dense.bits());
        if (b == 128) {
          EXPECT_EQ(attend.bits(), dense.bits());
        }
        EXPECT_TRUE(close(attend, dense_f64(run, data.inputs()), dtype));
      }
    }
  }
}

TEST(Attend, LseMayBeLeftOut) {
  Case c{.q_lengths = {100}, .k_lengths = {100}};
  const Data data(c);
  for (const Options& options : {reference_options(), Options{.threads = 2}}) {
    const Plan plan(c.problem(), options);
    std::vector<std::byte> workspace(plan.workspace_bytes());
    Attention with(plan.problem()), without(plan.problem());
    forward(plan, data.inputs(), with.outputs(), workspace);
    forward(plan, data.inputs(), {without.out.tensor(), {}}, workspace);
    EXPECT_EQ(with.out.bits(), without.out.bits());
    EXPECT_TRUE(without.lse.untouched());
    dense(plan, data.inputs(), with.outputs(), workspace);
    dense(plan, data.inputs(), {without.out.tensor(), {}}, workspace);
    EXPECT_EQ(with.out.bits(), without.out.bits());
  }
}

// All key heads read the same keys: a stride of 0.
TEST(Attend, InputsMayRepeatElements) {
  Case c{.q_heads = 4, .kv_heads = 2, .q_lengths = {90}, .k_lengths = {90}};
  Data data(c);
  Inputs repeated = data.inputs();
  repeated.k.stride[1] = repeated.v.stride[1] = 0;
  for (std::int64_t j = 0; j < 90; ++j) {
    for (std::int64_t x = 0; x < 16; ++x) {
      data.k.set(j, 1, x, data.k.get(j, 0, x));
      data.v.set(j, 1, x, data.v.get(j, 0, x));
    }
  }
  for (const Options& options : {reference_options(), Options{.threads = 2}}) {
    Runner run(c.problem(), options);
    EXPECT_EQ(run.forward(repeated).bits(), run.forward(data.inputs()).bits());
  }
}

// Scores in the hundreds and thousands: their rounding is the error of the weights (spec section 10).
TEST(Attend, LargeScores) {
  for (const DType dtype : kTypes) {
    for (const float amplitude : {30.0f, 1000.0f}) {
      Case c{.dtype = dtype,
             .q_heads = 2,
             .head_dim = 32,
             .q_lengths = {150},
             .k_lengths = {150},
             .config = {.block_size = 32, .top_k = 3}};
      c.q_amplitude = c.k_amplitude = amplitude;
      Data data(c);
      for (std::int64_t j = 0; j < 150; ++j) {  // no cancellation among the values
        for (std::int64_t x = 0; x < 32; ++x) data.v.set(j, 0, x, data.v.get(j, 0, x) * 0.4f + 1.0f);
      }
      const double extra = 2 * score_error(data, 1 / std::sqrt(32.0));
      Runner reference(c.problem(), reference_options());
      for (const Options& options : cpu_kernels(dtype)) {
        Runner run(c.problem(), options);
        Chosen chosen = run.select(data.inputs());
        EXPECT_TRUE(close(run.forward(data.inputs()), attend_f64(reference, data.inputs(), chosen), dtype, extra))
            << describe(options) << ", " << extra;
      }
    }
  }
}

// So large that one key has all the weight: the row is that key's value.
TEST(Attend, HugeScoresPickOneKey) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const float amplitude : {1e4f, 1e10f, 1e17f}) {
      Case c{.dtype = dtype,
             .q_heads = 2,
             .head_dim = 16,
             .q_lengths = {130},
             .k_lengths = {130},
             .config = {.block_size = 16, .top_k = 3}};
      c.q_amplitude = c.k_amplitude = amplitude;
      const Data data(c);
      const double error = score_error(data, 0.25);
      for (const Options& options : cpu_kernels(dtype)) {
        Runner run(c.problem(), options);
        Chosen chosen = run.select(data.inputs());
        const Attention got = run.forward(data.inputs());
        int clear = 0;
        for (std::int64_t token = 0; token < 130; ++token) {
          double best = -INFINITY, second = -INFINITY;
          std::int64_t key = 0;
          for (const std::int32_t b : chosen.row(token, 0)) {
            const std::int64_t first = std::int64_t{b} * 16;
            for (std::int64_t j = first; j < std::min(token + 1, first + 16); ++j) {
              double score = 0;
              for (std::int64_t x = 0; x < 16; ++x) score += 0.25 * data.q.get(token, 0, x) * data.k.get(j, 0, x);
              second = std::max(second, std::min(best, score));
              if (score > best) best = score, key = j;
            }
          }
          if (best - second < 2 * error + 200) continue;
          ++clear;
          for (std::int64_t x = 0; x < 16; ++x)
            ASSERT_EQ(got.out.get(token, 0, x), data.v.get(key, 0, x)) << describe(options) << ", token " << token;
          ASSERT_NEAR(got.lse.get(0, token), best, 1e-5 * std::abs(best));
        }
        EXPECT_GT(clear, 100);
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
