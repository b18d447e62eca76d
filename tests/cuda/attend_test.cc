// attend, dense and forward of both kernel families against float64 and against the cpu backend.
#include <algorithm>
#include <cmath>
#include <optional>

#include "cases.h"
#include "cuda_test.h"

namespace moba::test {
namespace {

// A case with what the host computes of it.
struct Expected {
  Case c;
  Data data;
  Chosen chosen;       // the reference's
  Chosen any, shared;  // of anybody's
  reference::Rows gated_rows, any_rows, shared_rows, dense_rows;
  reference::Rows cpu_any_rows, cpu_dense_rows;
  Array centroids;

  explicit Expected(Case given)
      : c(std::move(given)),
        data(c),
        chosen(Runner(c.problem(), reference_options()).select(data.inputs())),
        any(Plan(c.problem(), reference_options()), Layout{.gap = 1}),
        shared(Plan(c.problem(), reference_options()), {}, true) {
    Runner run(c.problem(), reference_options());
    const Inputs inputs = data.inputs();
    centroids = run.pool(inputs);
    for (Chosen* one : {&any, &shared}) {
      choose_anything(c, *one, c.seed + 5);
      run.index(inputs, *one);
    }
    gated_rows = attend_f64(run, inputs, chosen);
    any_rows = attend_f64(run, inputs, any);
    shared_rows = attend_f64(run, inputs, shared);
    dense_rows = dense_f64(run, inputs);
    cpu_any_rows = cpu_rows(c, data, &any);
    cpu_dense_rows = cpu_rows(c, data, nullptr);
  }
};

bool chooses_all(const Case& c) {
  return std::ranges::all_of(c.k_lengths, [&](std::int64_t length) {
    return (length + c.config.block_size - 1) / c.config.block_size <= c.config.top_k;
  });
}

void expect_forward(Expected& e, CudaRunner& run) {
  const Inputs inputs = e.data.inputs();
  Chosen chosen = run.select(inputs);
  EXPECT_TRUE(explained_picks(e.c, inputs, e.centroids, e.chosen, chosen));
  EXPECT_TRUE(chosen.surroundings_untouched());
  const Attention got = run.forward(inputs, e.c.outputs);
  EXPECT_TRUE(got.surroundings_untouched());
  if (chosen.ids.bits() == e.chosen.ids.bits()) {
    EXPECT_TRUE(near(got, e.gated_rows, e.c.dtype));
  } else {  // explained above
    Runner reference(e.c.problem(), reference_options());
    EXPECT_TRUE(near(got, attend_f64(reference, inputs, chosen), e.c.dtype));
  }
  // Choosing everything is full attention; else the stages on their own give what forward gives.
  const Attention by_stages = chooses_all(e.c) ? run.dense(inputs) : run.attend(inputs, chosen);
  EXPECT_TRUE(got.bits() == by_stages.bits()) << "forward and its stages differ";
}

void expect_all(Expected& e) {
  for (const std::string& family : families(e.c.problem())) {
    SCOPED_TRACE(::testing::Message() << e.c << ", " << family);
    CudaRunner run(e.c.problem(), cuda_options(family));
    const Inputs inputs = e.data.inputs();
    expect_forward(e, run);
    const Attention dense = run.dense(inputs, e.c.outputs);
    EXPECT_TRUE(dense.surroundings_untouched());
    EXPECT_TRUE(near(dense, e.dense_rows, e.c.dtype)) << "dense";
    EXPECT_TRUE(near(dense, e.cpu_dense_rows, e.c.dtype)) << "dense and the cpu";
    const Attention any = run.attend(inputs, e.any, e.c.outputs);
    EXPECT_TRUE(any.surroundings_untouched());
    EXPECT_TRUE(near(any, e.any_rows, e.c.dtype)) << "any selection";
    EXPECT_TRUE(near(any, e.cpu_any_rows, e.c.dtype)) << "any selection and the cpu";
    EXPECT_TRUE(near(run.attend(inputs, e.shared, e.c.outputs), e.shared_rows, e.c.dtype)) << "shared selection";
  }
}

void expect_all(const std::vector<Case>& cases) {
  constexpr std::size_t kAtOnce = 64;  // in memory
  for (std::size_t first = 0; first < cases.size(); first += kAtOnce) {
    std::vector<std::optional<Expected>> expected(std::min(kAtOnce, cases.size() - first));
    in_parallel(expected.size(), [&](std::size_t i) { expected[i].emplace(cases[first + i]); });
    for (std::optional<Expected>& e : expected) {
      expect_all(*e);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

// The inputs of every run are new.
std::vector<Case> reseeded(std::vector<Case> cases) {
  for (Case& c : cases) c.seed += run_seed() * 1000;
  return cases;
}

class CudaAttend : public CudaTest {};

TEST_F(CudaAttend, Small) { expect_all(reseeded(small_cases())); }

TEST_F(CudaAttend, Grid) { expect_all(reseeded(grid_cases())); }

TEST_F(CudaAttend, ManySequences) { expect_all({many_sequences()}); }

TEST_F(CudaAttend, RandomProblems) {
  std::vector<Case> cases;
  const auto count = static_cast<std::uint64_t>(random_cases(150));
  cases.reserve(count);
  for (std::uint64_t i = 0; i < count; ++i) cases.push_back(random_case(run_seed() * 1000 + i));
  expect_all(cases);
}

// Larger than float64 has time for: the cpu backend judges.
TEST_F(CudaAttend, LargeAgainstTheCpu) {
  std::vector<Case> cases;
  for (const auto& [d, block_size, k] :
       {std::tuple{128, 128, 8}, {64, 64, 12}, {128, 512, 3}, {128, 16, 40}, {256, 128, 4}}) {
    for (const bool packed : {false, true}) {
      Case c{.name = "large", .dtype = DType::bf16, .q_heads = 8, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
      c.q_lengths = c.k_lengths =
          packed ? std::vector<std::int64_t>{1000, 0, 1, 3000, 4096} : std::vector<std::int64_t>{8192};
      c.config = {.block_size = block_size, .top_k = k};
      cases.push_back(c);
    }
  }
  struct Judge {
    Data data;
    Chosen chosen;
    reference::Rows rows, dense_rows;
    explicit Judge(const Case& c) : data(c), chosen(Runner(c.problem(), {.threads = 1}).select(data.inputs())) {
      rows = cpu_rows(c, data, &chosen);
      dense_rows = cpu_rows(c, data, nullptr);
    }
  };
  std::vector<std::optional<Judge>> judges(cases.size());
  in_parallel(cases.size(), [&](std::size_t i) { judges[i].emplace(cases[i]); });
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    Judge& judge = *judges[i];
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      CudaRunner run(c.problem(), cuda_options(family));
      EXPECT_TRUE(near(run.attend(judge.data.inputs(), judge.chosen), judge.rows, c.dtype));
      EXPECT_TRUE(near(run.dense(judge.data.inputs()), judge.dense_rows, c.dtype));
    }
  }
}

// All queries want the same block: one list holds all rows, the others none.
TEST_F(CudaAttend, SinkSkewed) {
  std::vector<Case> cases;
  for (const auto& [d, block_size] : {std::pair{64, 64}, {128, 128}, {128, 256}, {96, 32}}) {
    cases.push_back({.name = "sink",
                     .dtype = DType::bf16,
                     .q_heads = 8,
                     .kv_heads = 2,
                     .head_dim = d,
                     .q_lengths = {1500},
                     .k_lengths = {1500},
                     .config = {.block_size = block_size, .top_k = 2},
                     .seed = run_seed()});
  }
  std::vector<std::optional<Data>> data(cases.size());
  std::vector<reference::Rows> rows(cases.size());
  const auto make = [&](std::size_t i) {
    const Case& c = cases[i];
    data[i].emplace(c);
    for (std::int64_t token = 0; token < 1500; ++token) {
      for (std::int64_t head = 0; head < 8; ++head) data[i]->q.set(token, head, 0, 3.0f);
      for (std::int64_t head = 0; head < 2; ++head)
        data[i]->k.set(token, head, 0, token < c.config.block_size ? 8.0f : -8.0f);
    }
    Runner run(c.problem(), reference_options());
    Chosen chosen = run.select(data[i]->inputs());
    for (std::int64_t token = 0; token < 1500; ++token) ASSERT_EQ(chosen.row(token, 5).front(), 0);
    rows[i] = attend_f64(run, data[i]->inputs(), chosen);
  };
  in_parallel(cases.size(), make);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    for (const std::string& family : families(cases[i].problem())) {
      SCOPED_TRACE(::testing::Message() << cases[i] << ", " << family);
      CudaRunner run(cases[i].problem(), cuda_options(family));
      EXPECT_TRUE(near(run.forward(data[i]->inputs()), rows[i], cases[i].dtype));
    }
  }
}

// Keys in clusters, far from each other, and queries that look for one each: skewed choices and large scores.
TEST_F(CudaAttend, Clustered) {
  for (const DType dtype : kTypes) {
    Case c{.name = "clusters", .dtype = dtype, .q_heads = 4, .kv_heads = 2, .head_dim = 128, .seed = run_seed()};
    c.q_lengths = {900, 333};
    c.k_lengths = {900, 700};
    c.config = {.block_size = 64, .top_k = 4};
    Data data(c);
    Random random(run_seed());
    Array centers(DType::f32, {7, 1, 128});
    centers.fill(run_seed() + 9, 0.7f);
    const auto shift = [&](Array& x, std::int64_t run_length) {
      std::int64_t cluster = 0;
      for (std::int64_t i = 0; i < x.dim(0); ++i) {
        if (i % run_length == 0) cluster = random.integer(0, 6);
        for (std::int64_t h = 0; h < x.dim(1); ++h) {
          for (std::int64_t l = 0; l < 128; ++l) x.set(i, h, l, 0.3f * x.get(i, h, l) + centers.get(cluster, 0, l));
        }
      }
    };
    shift(data.k, 50);
    shift(data.q, 1);
    Runner reference(c.problem(), reference_options());
    const Chosen expected = reference.select(data.inputs());
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      CudaRunner run(c.problem(), cuda_options(family));
      Chosen chosen = run.select(data.inputs());
      EXPECT_TRUE(explained_picks(c, data.inputs(), reference.pool(data.inputs()), expected, chosen));
      EXPECT_TRUE(near(run.forward(data.inputs()), attend_f64(reference, data.inputs(), chosen), dtype));
    }
  }
}

// Scores in the hundreds and thousands: their rounding is the error of the weights (spec section 10).
TEST_F(CudaAttend, LargeScores) {
  for (const DType dtype : kTypes) {
    for (const float amplitude : {30.0f, 300.0f}) {
      Case c{.dtype = dtype, .q_heads = 2, .head_dim = 64, .q_lengths = {150}, .k_lengths = {150}, .seed = run_seed()};
      c.config = {.block_size = 32, .top_k = 3};
      c.q_amplitude = c.k_amplitude = amplitude;
      Data data(c);
      for (std::int64_t j = 0; j < 150; ++j) {  // no cancellation among the values
        for (std::int64_t x = 0; x < 64; ++x) data.v.set(j, 0, x, data.v.get(j, 0, x) * 0.4f + 1.0f);
      }
      const double extra = 4 * score_error(data, 1 / std::sqrt(64.0));
      Runner reference(c.problem(), reference_options());
      for (const std::string& family : families(c.problem())) {
        CudaRunner run(c.problem(), cuda_options(family));
        Chosen chosen = run.select(data.inputs());
        EXPECT_TRUE(near(run.forward(data.inputs()), attend_f64(reference, data.inputs(), chosen), dtype, extra))
            << family << ", " << extra;
      }
    }
  }
}

TEST_F(CudaAttend, SmallWithoutLse) {
  Case c{.dtype = DType::bf16, .head_dim = 64, .q_lengths = {100}, .k_lengths = {100}};
  Data data(c);
  for (const std::string& family : families(c.problem())) {
    CudaRunner run(c.problem(), cuda_options(family));
    const Attention with = run.forward(data.inputs()), dense_with = run.dense(data.inputs());
    for (const bool dense : {false, true}) {
      Attention without(run.plan().problem());
      Mirror mirror(test_stream());
      const DeviceMemory workspace(run.plan().workspace_bytes());
      const Outputs outputs{mirror.write(without.out.tensor(), "out"), {}};
      const auto step = [&](auto&&... arguments) { dense ? moba::dense(arguments...) : moba::forward(arguments...); };
      step(run.plan(), mirror.read(data.inputs()), outputs, workspace.bytes(), Stream{test_stream()});
      mirror.finish();
      EXPECT_TRUE(without.out.bits() == (dense ? dense_with : with).out.bits()) << family;
    }
  }
}

}  // namespace
}  // namespace moba::test
