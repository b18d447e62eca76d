// backward and dense_backward of every cpu kernel against float64; the forward that keeps its selection.
#include <oneapi/tbb/global_control.h>
#include <algorithm>
#include <cmath>
#include <functional>

#include "fused_gradients.h"
#include "support.h"

namespace moba::test {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : kTypes) {
    const auto add = [&](Case c) {
      c.dtype = dtype;
      all.push_back(c);
    };
    for (const std::int64_t d : {8, 9, 15, 16, 17, 33, 63, 64, 65, 100, 128, 129, 192, 255, 256}) {
      add({.name = "dim " + std::to_string(d),
           .head_dim = d,
           .q_lengths = {75},
           .k_lengths = {75},
           .inputs = {.tight = true},
           .outputs = {.tight = true}});
    }
    for (const std::int64_t b : {1, 3, 17, 127, 128, 129, 200, 300, 1000}) {
      for (const bool causal : {true, false}) {
        add({.name = "block " + std::to_string(b) + (causal ? "" : " not causal"),
             .head_dim = 20,
             .q_lengths = {causal ? 291 : 60},
             .k_lengths = {291},
             .config = {.block_size = b, .top_k = 2, .causal = causal}});
      }
    }
    for (const auto& [q_heads, kv_heads] : {std::pair{1, 1}, {3, 1}, {9, 3}, {8, 2}, {71, 1}}) {
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
    for (const bool causal : {true, false}) {
      const Config config{.block_size = 32, .top_k = 3, .causal = causal};
      const std::string end = causal ? "" : " not causal";
      add({.name = "one token" + end, .q_lengths = {1}, .k_lengths = {1}, .config = config});
      add({.name = "one query" + end, .q_heads = 3, .q_lengths = {1}, .k_lengths = {400}, .config = config});
      add({.name = "few queries" + end, .q_heads = 3, .q_lengths = {37}, .k_lengths = {300}, .config = config});
      add({.name = "more queries than keys" + end, .q_lengths = {150}, .k_lengths = {70}, .config = config});
      add({.name = "no keys" + end, .q_lengths = {5}, .k_lengths = {0}, .config = config});
      add({.name = "no queries" + end, .q_lengths = {0}, .k_lengths = {50}, .config = config});
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
      for (const double scale : {0.0, -0.25}) {
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
         .q_lengths = {kSanitized ? 600 : 1100},
         .k_lengths = {kSanitized ? 700 : 1300},
         .config = {.block_size = 64, .top_k = 3}});
  }
  return all;
}

class BackwardCases : public ::testing::TestWithParam<Case> {};

// From end to end: the gradients of the cpu's own rounded out and lse, against float64 throughout.
TEST_P(BackwardCases, IsCloseToFloat64) {
  const Case& c = GetParam();
  const Data data(c);
  const Array dout = noise_dout(c);
  for (const Options& options : cpu_kernels(c.dtype)) {
    SCOPED_TRACE(describe(options));
    Runner run(c.problem(), options);
    Chosen chosen(run.plan());
    Attention results = run.forward(data.inputs(), chosen, c.outputs);
    const Slopes got = run.backward(data.inputs(), chosen, results, dout, c.outputs);
    EXPECT_TRUE(got.surroundings_untouched());
    const reference::GradientRows expected =
        backward_f64(run, data.inputs(), run.plan().forward_is_dense() ? nullptr : &chosen, dout);
    EXPECT_TRUE(close(got, expected, data, dout, scale_of(c), gradient_bound(c.dtype)));

    Attention all = run.dense(data.inputs(), c.outputs);
    const Slopes dense = run.dense_backward(data.inputs(), all, dout, c.outputs);
    EXPECT_TRUE(dense.surroundings_untouched());
    EXPECT_TRUE(close(dense, backward_f64(run, data.inputs(), nullptr, dout), data, dout, scale_of(c),
                      gradient_bound(c.dtype)));
    if (run.plan().forward_is_dense()) {
      EXPECT_EQ(got.bits(), dense.bits());
    }
  }
}

TEST_P(BackwardCases, AnySelectionIsCloseToFloat64) {
  const Case& c = GetParam();
  const Data data(c);
  const Array dout = noise_dout(c);
  Options options = cpu_kernels(c.dtype).front();
  Runner run(c.problem(), options);
  for (const bool shared : {false, true}) {
    Chosen chosen(run.plan(), {}, shared);
    choose_anything(c, chosen, c.seed);
    run.index(data.inputs(), chosen);
    Attention results = run.attend(data.inputs(), chosen);
    const Slopes got = run.backward(data.inputs(), chosen, results, dout, c.outputs);
    EXPECT_TRUE(
        close(got, backward_f64(run, data.inputs(), &chosen, dout), data, dout, scale_of(c), gradient_bound(c.dtype)));
    EXPECT_TRUE(got.surroundings_untouched());
  }
}

INSTANTIATE_TEST_SUITE_P(Backward, BackwardCases, ::testing::ValuesIn(cases()), case_name);

TEST(Backward, ForwardKeepsItsSelection) {
  Case c{.q_heads = 4,
         .kv_heads = 2,
         .q_lengths = {100, 60},
         .k_lengths = {120, 60},
         .config = {.block_size = 16, .top_k = 3},
         .rope = Rope{}};
  const Data data(c);
  for (const Backend backend : {Backend::cpu, Backend::reference}) {
    Options options;
    options.backend = backend;
    Runner run(c.problem(), options);
    Chosen kept(run.plan(), {.gap = 2});
    const Attention got = run.forward(data.inputs(), kept);
    EXPECT_EQ(got.bits(), run.forward(data.inputs()).bits());
    const auto rotated = run.rope(data.inputs());
    Inputs turned = data.inputs();
    turned.q = rotated.first.tensor();
    turned.k = rotated.second.tensor();
    const Chosen chosen = run.select(turned);
    EXPECT_EQ(kept.ids.bits(), chosen.ids.bits());
    EXPECT_EQ(kept.counts.bits(), chosen.counts.bits());
    EXPECT_EQ(kept.offsets.bits(), chosen.offsets.bits());
    EXPECT_EQ(kept.transpose(), chosen.transpose());
    EXPECT_TRUE(kept.surroundings_untouched());
  }
  c.config.top_k = 8;  // every block
  Runner run(c.problem(), {});
  ASSERT_TRUE(run.plan().forward_is_dense());
  Attention results(run.plan().problem());
  std::vector<std::byte> workspace(run.plan().workspace_bytes());
  forward(run.plan(), data.inputs(), Selection{}, results.outputs(), workspace);
  EXPECT_EQ(results.bits(), run.dense(data.inputs()).bits());
  const Array dout = noise_dout(c);
  Slopes slopes(run.plan().problem());
  std::vector<std::byte> backward_workspace(run.plan().backward_workspace_bytes());
  backward(run.plan(), data.inputs(), Selection{}, {results.out.tensor(), results.lse.tensor()}, dout.tensor(),
           slopes.gradients(), backward_workspace);
  EXPECT_EQ(slopes.bits(), run.dense_backward(data.inputs(), results, dout).bits());
}

std::vector<Case> thread_cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    all.push_back({.name = "packed",
                   .dtype = dtype,
                   .q_heads = 6,
                   .kv_heads = 2,
                   .head_dim = 24,
                   .q_lengths = {1, 700, 0, 90, 400, 3, 1000},
                   .k_lengths = {1, 800, 5, 70, 400, 0, 1000},
                   .config = {.block_size = 50, .top_k = 3},
                   .rope = Rope{}});
    all.push_back({.name = "not causal",
                   .dtype = dtype,
                   .q_heads = 4,
                   .kv_heads = 1,
                   .head_dim = 16,
                   .q_lengths = {1200},
                   .k_lengths = {900},
                   .config = {.block_size = 150, .top_k = 4, .causal = false}});
  }
  return all;
}

class BackwardThreads : public ::testing::TestWithParam<Case> {};

TEST_P(BackwardThreads, AndRunsDoNotMatter) {
  const oneapi::tbb::global_control control(oneapi::tbb::global_control::max_allowed_parallelism, 8);
  const Case& c = GetParam();
  Data data(c);
  data.v.set(c.total_k() / 3, 0, 1, NAN);
  data.k.set(c.total_k() / 2 + 7, 0, 3, INFINITY);
  const Array dout = noise_dout(c);
  for (const Options& kernel : cpu_kernels(c.dtype)) {
    Options options = kernel;
    std::vector<std::uint64_t> expected;
    const bool best = is_of_best_target(kernel);
    if (kSanitized && !best) continue;
    const std::vector<int> counts = kSanitized ? std::vector{1, 3, 8} : std::vector{1, 2, 3, 5, 8, 8, 2};
    for (const int threads : best ? counts : std::vector{1, 3}) {
      options.threads = threads;
      Runner run(c.problem(), options);
      Chosen chosen(run.plan());
      Attention results = run.forward(data.inputs(), chosen), all = run.dense(data.inputs());
      std::vector<std::uint64_t> got = run.backward(data.inputs(), chosen, results, dout).bits();
      const auto more = run.dense_backward(data.inputs(), all, dout).bits();
      got.insert(got.end(), more.begin(), more.end());
      if (expected.empty()) expected = got;
      EXPECT_TRUE(got == expected) << describe(options);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backward, BackwardThreads, ::testing::ValuesIn(thread_cases()), case_name);

// Workspaces of exactly the size, at any address, between guards and with any content.
TEST(Backward, WorkspaceIsAllThatItTakes) {
  for (const std::int64_t d : {24, 33}) {
    Case c{.dtype = DType::bf16,
           .q_heads = 4,
           .kv_heads = 2,
           .head_dim = d,
           .q_lengths = {700, 40, 0},
           .k_lengths = {800, 40, 3},
           .config = {.block_size = 70, .top_k = 3}};
    if (d % 2 == 0) c.rope = Rope{};
    const Data data(c);
    const Array dout = noise_dout(c);
    for (const Options& options : cpu_kernels(c.dtype, 3)) {
      SCOPED_TRACE(describe(options));
      Runner run(c.problem(), options);
      Chosen chosen(run.plan());
      Attention results = run.forward(data.inputs(), chosen);
      const Slopes expected = run.backward(data.inputs(), chosen, results, dout);
      const std::size_t bytes = run.plan().backward_workspace_bytes();
      for (const std::size_t start : {64, 65, 127}) {
        for (const int content : kSanitized ? std::vector{0xff} : std::vector{0, 0xff, 0x7f}) {
          std::vector<std::byte> memory(bytes + start + 64, static_cast<std::byte>(content));
          Slopes got(run.plan().problem());
          backward(run.plan(), data.inputs(), chosen.selection(), {results.out.tensor(), results.lse.tensor()},
                   dout.tensor(), got.gradients(), std::span(memory).subspan(start, bytes));
          EXPECT_TRUE(got.bits() == expected.bits()) << start << " " << content;
          const auto untouched = [&](std::byte b) { return b == static_cast<std::byte>(content); };
          EXPECT_TRUE(std::ranges::all_of(std::span(memory).first(start), untouched));
          EXPECT_TRUE(std::ranges::all_of(std::span(memory).subspan(start + bytes), untouched));
        }
      }
    }
  }
}

TEST(Backward, GradientsMayLieBetweenOneAnother) {
  for (const DType dtype : kTypes) {
    Case c{.dtype = dtype, .q_heads = 4, .kv_heads = 2, .head_dim = 24, .q_lengths = {90, 7}, .k_lengths = {90, 7}};
    if (dtype == DType::bf16) c.rope = Rope{};
    const Data data(c);
    const Array dout = noise_dout(c);
    std::vector<Options> kernels = cpu_kernels(dtype);
    kernels.push_back(reference_options());
    for (const Options& options : kernels) {
      Runner run(c.problem(), options);
      Chosen chosen(run.plan());
      Attention results = run.forward(data.inputs(), chosen), of_all = run.dense(data.inputs());
      const Slopes expected = run.backward(data.inputs(), chosen, results, dout);
      const Slopes expected_of_all = run.dense_backward(data.inputs(), of_all, dout);
      for (const bool in_turn : {false, true}) {
        SCOPED_TRACE(describe(options) + (in_turn ? ", dk and dv in turn" : ""));
        const FusedGradients fused(in_turn);
        Array all(dtype, {c.total_q(), FusedGradients::kHeads, c.head_dim});
        std::vector<std::byte> workspace(run.plan().backward_workspace_bytes());
        backward(run.plan(), data.inputs(), chosen.selection(), {results.out.tensor(), results.lse.tensor()},
                 dout.tensor(), fused.of(all.tensor()), workspace);
        EXPECT_TRUE(fused.hold(expected, all));
        dense_backward(run.plan(), data.inputs(), {of_all.out.tensor(), of_all.lse.tensor()}, dout.tensor(),
                       fused.of(all.tensor()), workspace);
        EXPECT_TRUE(fused.hold(expected_of_all, all));
        EXPECT_TRUE(all.surroundings_untouched());
      }
    }
  }
}

// An element that two share, wherever it is, is found.
TEST(Backward, GradientsThatMeetAreRefused) {
  const Case c{.q_heads = 4, .kv_heads = 2, .head_dim = 24, .q_lengths = {90}, .k_lengths = {90}};
  const Data data(c);
  const Array dout = noise_dout(c);
  Runner run(c.problem(), {});
  Chosen chosen(run.plan());
  Attention results = run.forward(data.inputs(), chosen);
  std::vector<std::byte> workspace(run.plan().backward_workspace_bytes());
  const auto refused = [&](const std::function<void(FusedGradients&)>& wrong_heads,
                           const std::function<void(Gradients&)>& wrong_places) {
    Array all(c.dtype, {c.total_q(), FusedGradients::kHeads, c.head_dim});
    FusedGradients fused(false);
    wrong_heads(fused);
    Gradients gradients = fused.of(all.tensor());
    wrong_places(gradients);
    EXPECT_THROW(backward(run.plan(), data.inputs(), chosen.selection(), {results.out.tensor(), results.lse.tensor()},
                          dout.tensor(), gradients, workspace),
                 Error);
    EXPECT_TRUE(all.untouched());
  };
  const auto as_it_is = [](auto&) {};
  refused([](FusedGradients& f) { f.dk.first = 3; }, as_it_is);  // dq's last head
  refused([](FusedGradients& f) { f.dv.first = 6; }, as_it_is);
  refused([](FusedGradients& f) { f.dk = {5, 3, 2}, f.dv = {6, 2, 2}; }, as_it_is);  // both head 8
  refused(as_it_is, [](Gradients& g) { g.dv.data = static_cast<float*>(g.dv.data) - 1; });
  refused(as_it_is, [](Gradients& g) { g.dv.stride[0] += 24; });  // by the fourth token over dq
}

}  // namespace
}  // namespace moba::test
