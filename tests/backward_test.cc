// backward: the reference against central differences, every cpu kernel against the reference.
#include <oneapi/tbb/global_control.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "support.h"

namespace moba::test {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

double scale_of(const Case& c) { return c.config.scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim))); }

// ---- The reference. ----

// sum(dout * out) of float64 forward, over the given choice or all keys, after the rope of the plan if it has one.
double loss(Runner& run, const Inputs& given, Chosen* chosen, const std::vector<double>& dout) {
  Inputs inputs = given;
  std::pair<Array, Array> rotated;
  if (run.plan().problem().rope) {
    rotated = run.rope(given);
    inputs.q = rotated.first.tensor();
    inputs.k = rotated.second.tensor();
  }
  const reference::Rows rows = chosen ? attend_f64(run, inputs, *chosen) : dense_f64(run, inputs);
  double sum = 0;
  for (std::size_t i = 0; i < dout.size(); ++i) sum += dout[i] * rows.out[i];
  return sum;
}

// The derivative by every element of x, by differences of fourth order. x holds multiples of `step`, small enough that
// sums with it are exact.
std::vector<double> differences(Array& x, double step, const std::function<double()>& f) {
  std::vector<double> slopes;
  for (std::int64_t i = 0; i < x.dim(0); ++i) {
    for (std::int64_t j = 0; j < x.dim(1); ++j) {
      for (std::int64_t l = 0; l < x.dim(2); ++l) {
        const float at = x.get(i, j, l);
        const auto moved = [&](double steps) {
          x.set(i, j, l, static_cast<float>(at + steps * step));
          return f();
        };
        slopes.push_back((8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step));
        x.set(i, j, l, at);
      }
    }
  }
  return slopes;
}

void round_to(Array& x, double step) {
  for (std::int64_t i = 0; i < x.dim(0); ++i) {
    for (std::int64_t j = 0; j < x.dim(1); ++j) {
      for (std::int64_t l = 0; l < x.dim(2); ++l) {
        x.set(i, j, l, static_cast<float>(std::round(x.get(i, j, l) / step) * step));
      }
    }
  }
}

void expect_near(const std::vector<double>& got, const std::vector<double>& expected, double bound, const char* name) {
  ASSERT_EQ(got.size(), expected.size());
  double most = 1;
  for (const double slope : expected) most = std::max(most, std::abs(slope));
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], bound * most) << name << " " << i;
}

std::vector<Case> small_cases() {
  std::vector<Case> all;
  for (const bool causal : {true, false}) {
    const Config config{.block_size = 4, .top_k = 2, .causal = causal};
    all.push_back({.name = "one sequence",
                   .q_heads = 4,
                   .kv_heads = 2,
                   .head_dim = 8,
                   .q_lengths = {17},
                   .k_lengths = {17},
                   .config = config});
    all.push_back({.name = "lengths",
                   .head_dim = 9,
                   .q_lengths = {5, 9, 0, 3, 1, 4},
                   .k_lengths = {11, 3, 5, 0, 1, 12},
                   .config = config});
    all.push_back({.name = "scale",
                   .head_dim = 8,
                   .q_lengths = {12},
                   .k_lengths = {15},
                   .config = {.block_size = 3, .top_k = 3, .causal = causal, .scale = -0.7}});
  }
  return all;
}

class SmallBackward : public ::testing::TestWithParam<Case> {};

TEST_P(SmallBackward, ReferenceIsTheSlopeOfForward) {
  const Case& c = GetParam();
  Data data(c);
  for (Array* x : {&data.q, &data.k, &data.v}) round_to(*x, 0x1p-7);
  const Array dout = noise_dout(c);
  Runner run(c.problem(), reference_options());
  Chosen gated = run.select(data.inputs()), any(run.plan()), shared(run.plan(), {}, true);
  for (Chosen* chosen : {&any, &shared}) {
    choose_anything(c, *chosen, c.seed);
    run.index(data.inputs(), *chosen);
  }
  for (Chosen* chosen : {&gated, &any, &shared, static_cast<Chosen*>(nullptr)}) {
    const reference::GradientRows got = backward_f64(run, data.inputs(), chosen, dout);
    const auto by = [&](Array& x) {
      return differences(x, 0x1p-7, [&] { return loss(run, data.inputs(), chosen, dout.numbers()); });
    };
    expect_near(got.dq, by(data.q), 1e-7, "dq");
    expect_near(got.dk, by(data.k), 1e-7, "dk");
    expect_near(got.dv, by(data.v), 1e-7, "dv");
  }
}

INSTANTIATE_TEST_SUITE_P(Backward, SmallBackward, ::testing::ValuesIn(small_cases()), case_name);

std::vector<Rope> ropes() {
  Rope partial, interleaved, yarn;
  partial.rotary_dim = 4;
  interleaved.style = RopeStyle::interleaved;
  interleaved.base = 100;
  yarn.scaling = RopeScaling::yarn;
  yarn.factor = 4;
  yarn.original_max_position = 16;
  return {Rope{}, partial, interleaved, yarn};
}

// With a rope in the plan the gradients are those of the unrotated q and k. (The rotated ones are rounded to float32,
// which is noise to the differences; so the steps are longer and the bound is wider.)
TEST(BackwardRope, ReferenceIsTheSlopeOfForward) {
  for (const Rope& rope : ropes()) {
    Case c{
        .head_dim = 8, .q_lengths = {6, 4}, .k_lengths = {9, 4}, .config = {.block_size = 3, .top_k = 2}, .rope = rope};
    Data data(c);
    for (Array* x : {&data.q, &data.k, &data.v}) round_to(*x, 0x1p-4);
    const Array dout = noise_dout(c);
    Runner run(c.problem(), reference_options());
    Chosen chosen(run.plan());
    Attention results = run.forward(data.inputs(), chosen);
    const Slopes got = run.backward(data.inputs(), chosen, results, dout);
    const auto by = [&](Array& x) {
      return differences(x, 0x1p-4, [&] { return loss(run, data.inputs(), &chosen, dout.numbers()); });
    };
    expect_near(got.dq.numbers(), by(data.q), 2e-5, "dq");
    expect_near(got.dk.numbers(), by(data.k), 2e-5, "dk");
    expect_near(got.dv.numbers(), by(data.v), 2e-5, "dv");
  }
}

// ---- The cpu backend. ----

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
         .q_lengths = {1100},
         .k_lengths = {1300},
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
  if (run.plan().forward_is_dense()) return;
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

// The cpu turns its gradients back as the reference does; and turning them is all that a rope adds.
TEST(BackwardRope, CpuIsCloseToTheReference) {
  for (const DType dtype : kTypes) {
    for (const Rope& rope : ropes()) {
      Case c{.dtype = dtype,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = 24,
             .q_lengths = {150, 0, 31},
             .k_lengths = {170, 3, 31},
             .config = {.block_size = 16, .top_k = 3},
             .outputs = {.gap = 3}};
      c.rope = rope;
      if (rope.rotary_dim == 0 && rope.style == RopeStyle::half_split) c.rope->rotary_dim = 14;
      const Data data(c);
      const Array dout = noise_dout(c);
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(describe(options));
        Runner run(c.problem(), options);
        Chosen chosen(run.plan());
        Attention results = run.forward(data.inputs(), chosen);
        const auto rotated = run.rope(data.inputs());
        Inputs turned = data.inputs();
        turned.q = rotated.first.tensor();
        turned.k = rotated.second.tensor();
        const double bound = gradient_bound(dtype), scale = scale_of(c);
        EXPECT_TRUE(close(run.backward(data.inputs(), chosen, results, dout, c.outputs),
                          backward_f64(run, turned, &chosen, dout), data, dout, scale, bound));
        Attention all = run.dense(data.inputs());
        EXPECT_TRUE(close(run.dense_backward(data.inputs(), all, dout, c.outputs),
                          backward_f64(run, turned, nullptr, dout), data, dout, scale, bound));
      }
    }
  }
}

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
    const bool first = kernel.cpu_target == cpu_targets().front();
    for (const int threads : first ? std::vector{1, 2, 3, 5, 8, 8, 2} : std::vector{1, 3}) {
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

// ---- Values that are not finite. ----

struct Strange {
  Case c{.q_heads = 4,
         .kv_heads = 2,
         .head_dim = 20,
         .q_lengths = {200},
         .k_lengths = {200},
         .config = {.block_size = 40, .top_k = 2}};
  Data data{c};
  Array dout = noise_dout(c);
};

// Rows that chose a block and see a key of it, from ids.
bool sees(const Case& c, const Chosen& chosen, std::int64_t token, std::int64_t head, std::int64_t key) {
  const auto blocks = chosen.row(token, head);
  return key <= token && std::ranges::count(blocks, key / c.config.block_size) > 0;
}

// A NaN in a key or its value reaches the gradients of the rows that see it and, through those, of the keys that these
// see; nothing else.
TEST(BackwardNonfinite, KeysReachOnlyWhoSeesThem) {
  for (const DType dtype : kTypes) {
    for (const bool in_key : {true, false}) {
      Strange s;
      s.c.dtype = dtype;
      s.data = Data(s.c);
      s.dout = noise_dout(s.c);
      std::vector<Options> kernels = cpu_kernels(dtype);
      kernels.push_back(reference_options());
      for (const Options& options : kernels) {
        SCOPED_TRACE(describe(options));
        Runner run(s.c.problem(), options);
        Data clean = s.data, spoiled = s.data;
        Chosen chosen = run.select(clean.inputs());
        (in_key ? spoiled.k : spoiled.v).set(70, 0, 3, NAN);
        Attention good = run.attend(clean.inputs(), chosen), bad = run.attend(spoiled.inputs(), chosen);
        const Slopes expected = run.backward(clean.inputs(), chosen, good, s.dout);
        const Slopes got = run.backward(spoiled.inputs(), chosen, bad, s.dout);
        std::vector<bool> key_reached(200);
        for (std::int64_t token = 0; token < 200; ++token) {
          for (std::int64_t head = 0; head < 4; ++head) {
            const bool reached = head < 2 && sees(s.c, chosen, token, head, 70);
            EXPECT_EQ(std::isnan(got.dq.get(token, head, 5)), reached) << token << " " << head;
            if (!reached) {
              EXPECT_EQ(got.dq.get(token, head, 5), expected.dq.get(token, head, 5)) << token << " " << head;
            }
            for (std::int64_t key = 0; reached && key < 200; ++key) {
              if (sees(s.c, chosen, token, head, key)) key_reached[key] = true;
            }
          }
        }
        for (std::int64_t key = 0; key < 200; ++key) {
          EXPECT_EQ(std::isnan(got.dk.get(key, 0, 5)), key_reached[key]) << key;
          EXPECT_FALSE(std::isnan(got.dk.get(key, 1, 5)) || std::isnan(got.dv.get(key, 1, 5))) << key;
          EXPECT_EQ(std::isnan(got.dv.get(key, 0, 5)), in_key && key_reached[key]) << key;
        }
      }
    }
  }
}

// A NaN in the dout of one row reaches that row and the keys it sees.
TEST(BackwardNonfinite, DoutReachesWhatTheRowSees) {
  Strange s;
  std::vector<Options> kernels = cpu_kernels(DType::f32);
  kernels.push_back(reference_options());
  for (const Options& options : kernels) {
    SCOPED_TRACE(describe(options));
    Runner run(s.c.problem(), options);
    Chosen chosen(run.plan());
    Attention results = run.forward(s.data.inputs(), chosen);
    Array dout = s.dout;
    dout.set(90, 2, 4, NAN);
    const Slopes got = run.backward(s.data.inputs(), chosen, results, dout);
    for (std::int64_t token = 0; token < 200; ++token) {
      for (std::int64_t head = 0; head < 4; ++head) {
        EXPECT_EQ(std::isnan(got.dq.get(token, head, 0)), token == 90 && head == 2);
      }
      for (std::int64_t head = 0; head < 2; ++head) {
        const bool reached = head == 1 && sees(s.c, chosen, 90, 2, token);
        EXPECT_EQ(std::isnan(got.dk.get(token, head, 0)), reached) << token;
        EXPECT_EQ(std::isnan(got.dv.get(token, head, 4)), reached) << token;
        EXPECT_FALSE(std::isnan(got.dv.get(token, head, 0))) << token;
      }
    }
  }
}

// Scores of -inf have weight 0: such a key gives nothing and gets nothing, and a row of them only is one without keys.
TEST(BackwardNonfinite, ScoresOfMinusInfinity) {
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {20}, .k_lengths = {20}, .config = {.block_size = 4, .top_k = 2}};
  Data data(c);
  for (std::int64_t i = 0; i < 20; ++i) data.q.set(i, 0, 0, 1.0f);
  data.k.set(0, 0, 0, -INFINITY);  // all that row 0 sees
  data.k.set(6, 0, 0, -INFINITY);
  Array dout = noise_dout(c);
  dout.set(0, 0, 3, INFINITY);
  std::vector<Options> kernels = cpu_kernels(DType::f32);
  kernels.push_back(reference_options());
  for (const Options& options : kernels) {
    SCOPED_TRACE(describe(options));
    Runner run(c.problem(), options);
    Chosen chosen = run.select(data.inputs());
    Attention results = run.attend(data.inputs(), chosen);
    const Slopes got = run.backward(data.inputs(), chosen, results, dout);
    EXPECT_TRUE(close(got, backward_f64(run, data.inputs(), &chosen, dout), Data(c), noise_dout(c), scale_of(c), 1e-5));
    for (std::int64_t x = 0; x < 8; ++x) {
      EXPECT_EQ(got.dq.get(0, 0, x), 0);
      for (const std::int64_t key : {0, 6}) {
        EXPECT_EQ(got.dk.get(key, 0, x), 0);
        EXPECT_EQ(got.dv.get(key, 0, x), 0);
      }
      for (std::int64_t i = 0; i < 20; ++i) EXPECT_TRUE(std::isfinite(got.dq.get(i, 0, x)));
    }
  }
}

// ---- Refusals. ----

// Good arguments of the backward functions and of the forward that keeps its selection; a test spoils one.
struct Arguments {
  Case c{.q_heads = 4,
         .kv_heads = 2,
         .head_dim = 8,
         .q_lengths = {20, 13},
         .k_lengths = {25, 33},
         .config = {.block_size = 8, .top_k = 2}};
  Data data{c};
  Plan plan{c.problem(), {.threads = 1}};
  std::vector<std::byte> memory =
      std::vector<std::byte>(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()), std::byte{0x5a});
  std::vector<std::byte> untouched_memory = memory;
  Attention computed{plan.problem()}, written{plan.problem()};
  Chosen read{plan}, kept{plan};
  Array dout_memory = noise_dout(c);
  Slopes slopes{plan.problem()};

  Inputs inputs = data.inputs();
  Selection selection = read.selection(), into = kept.selection();
  Outputs outputs = written.outputs();
  ConstOutputs results;
  ConstTensor dout = std::as_const(dout_memory).tensor();
  Gradients gradients = slopes.gradients();
  Workspace workspace = memory;

  Arguments() {
    forward(plan, inputs, selection, computed.outputs(), workspace);
    results = {computed.out.tensor(), computed.lse.tensor()};
    memory = untouched_memory;
  }
  bool untouched() const {
    return slopes.dq.untouched() && slopes.dk.untouched() && slopes.dv.untouched() && written.out.untouched() &&
           written.lse.untouched() && kept.ids.untouched() && kept.counts.untouched() && kept.offsets.untouched() &&
           kept.rows.untouched() && memory == untouched_memory;
  }
};

enum Function { kBackward, kDenseBackward, kForward };

void call(Function function, Arguments& a) {
  switch (function) {
    case kBackward:
      return backward(a.plan, a.inputs, a.selection, a.results, a.dout, a.gradients, a.workspace);
    case kDenseBackward:
      return dense_backward(a.plan, a.inputs, a.results, a.dout, a.gradients, a.workspace);
    case kForward:
      return forward(a.plan, a.inputs, a.into, a.outputs, a.workspace);
  }
}

void expect_refused(Function function, const std::string& starts_with, const std::function<void(Arguments&)>& spoil) {
  Arguments a;
  spoil(a);
  try {
    call(function, a);
    ADD_FAILURE() << "accepted: " << starts_with;
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_TRUE(message.starts_with(starts_with)) << message << "\nwanted: " << starts_with;
    EXPECT_NE(message.find("; allowed: "), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  EXPECT_TRUE(a.untouched()) << starts_with;
}

// A tensor among the arguments, and how to change it.
struct Argument {
  std::string name;
  std::function<void(Arguments&, const std::function<void(Tensor&)>&)> change;
};

void change_tensor(Tensor& tensor, const std::function<void(Tensor&)>& change) { change(tensor); }
void change_tensor(ConstTensor& tensor, const std::function<void(Tensor&)>& change) {
  Tensor view;
  view.data = const_cast<void*>(tensor.data);
  view.dtype = tensor.dtype, view.rank = tensor.rank, view.shape = tensor.shape, view.stride = tensor.stride;
  change(view);
  tensor = view;
}

#define ARGUMENT(name, member)                                                                              \
  Argument {                                                                                                \
    name, [](Arguments& a, const std::function<void(Tensor&)>& change) { change_tensor(a.member, change); } \
  }

TEST(BackwardRefused, Tensors) {
  const Argument tensors[] = {
      ARGUMENT("q", inputs.q),
      ARGUMENT("k", inputs.k),
      ARGUMENT("v", inputs.v),
      ARGUMENT("results.out", results.out),
      ARGUMENT("results.lse", results.lse),
      ARGUMENT("dout", dout),
      ARGUMENT("gradients.dq", gradients.dq),
      ARGUMENT("gradients.dk", gradients.dk),
      ARGUMENT("gradients.dv", gradients.dv),
  };
  for (const Argument& argument : tensors) {
    for (const Function f : {kBackward, kDenseBackward}) {
      const auto refused = [&](const std::string& text, const std::function<void(Tensor&)>& change) {
        expect_refused(f, argument.name + text, [&](Arguments& a) { argument.change(a, change); });
      };
      refused(": is not given; allowed: f32 [", [](Tensor& t) { t = {}; });
      refused(": is f16 [", [](Tensor& t) { t.dtype = DType::f16; });
      refused(": is f32 [21, ", [](Tensor& t) { t.shape[0] = 21; });
      refused(": is a null pointer", [](Tensor& t) { t.data = nullptr; });
      refused(": is not aligned", [](Tensor& t) { t.data = static_cast<std::byte*>(t.data) + 1; });
      refused(".device: is cuda", [](Tensor& t) { t.device = Device::cuda; });
      refused(".stride[0]: is -1", [](Tensor& t) { t.stride[0] = -1; });
      if (argument.name != "results.lse") refused(".stride[2]: is 2", [](Tensor& t) { t.stride[2] = 2; });
      if (argument.name.starts_with("gradients")) refused(".stride[0]: is 0", [](Tensor& t) { t.stride[0] = 0; });
    }
  }
}

// Every gradient over everything else.
TEST(BackwardRefused, Overlaps) {
  for (const Function f : {kBackward, kDenseBackward}) {
    expect_refused(f, "gradients.dq: is in memory that dout spans",
                   [](Arguments& a) { a.gradients.dq.data = const_cast<void*>(a.dout.data); });
    expect_refused(f, "gradients.dk: is in memory that k spans",
                   [](Arguments& a) { a.gradients.dk.data = const_cast<void*>(a.inputs.k.data); });
    expect_refused(f, "gradients.dv: is in memory that gradients.dk spans",
                   [](Arguments& a) { a.gradients.dv.data = a.gradients.dk.data; });
    expect_refused(f, "workspace: is in memory that gradients.dq spans", [](Arguments& a) {
      a.gradients.dq.data = a.memory.data() + (64 - reinterpret_cast<std::uintptr_t>(a.memory.data()) % 64) % 64;
    });
  }
  expect_refused(kForward, "selection.ids: is in memory that q spans",
                 [](Arguments& a) { a.into.ids.data = const_cast<void*>(a.inputs.q.data); });
  expect_refused(kForward, "selection.rows: is in memory that out spans",
                 [](Arguments& a) { a.into.rows.data = a.outputs.out.data; });
}

TEST(BackwardRefused, Workspaces) {
  for (const Function f : {kBackward, kDenseBackward}) {
    expect_refused(f,
                   "workspace: is " + std::to_string(Arguments().plan.backward_workspace_bytes() - 1) +
                       " bytes; allowed: at least plan.backward_workspace_bytes()",
                   [](Arguments& a) { a.workspace = a.workspace.first(a.plan.backward_workspace_bytes() - 1); });
  }
  expect_refused(kForward, "workspace: is 0 bytes; allowed: at least plan.workspace_bytes()",
                 [](Arguments& a) { a.workspace = {}; });
}

TEST(BackwardRefused, Selections) {
  expect_refused(kBackward, "selection.offsets: is not given", [](Arguments& a) { a.selection = {}; });
  expect_refused(kBackward, "selection.rows: is not given", [](Arguments& a) { a.selection.rows = {}; });
  expect_refused(kBackward, "selection.offsets[0]: is -1",
                 [](Arguments& a) { a.read.offsets.as<std::int64_t>(0) = -1; });
  expect_refused(kBackward, "selection.rows of key head 0, block ",
                 [](Arguments& a) { a.read.rows.as<std::int32_t>(0) = 1 << 20; });
  expect_refused(kForward, "selection.ids: is not given", [](Arguments& a) { a.into = {}; });
  expect_refused(kForward, "selection.ids: is i32 [33, 2, ", [](Arguments& a) { a.into.ids.shape[1] = 2; });
  expect_refused(kForward, "selection.offsets: is not given", [](Arguments& a) { a.into.offsets = {}; });
}

TEST(BackwardRefused, Sequences) {
  for (const Function f : {kBackward, kDenseBackward, kForward}) {
    expect_refused(f, "cu_seqlens_q[2]: is 32", [](Arguments& a) { a.data.cu_seqlens_q->as<std::int32_t>(2) = 32; });
    expect_refused(f, "cu_seqlens_k[1]: is -1", [](Arguments& a) { a.data.cu_seqlens_k->as<std::int32_t>(1) = -1; });
    expect_refused(f, "cu_seqlens_q: is not given", [](Arguments& a) { a.inputs.cu_seqlens_q = {}; });
  }
}

}  // namespace
}  // namespace moba::test
