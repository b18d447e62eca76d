// The same bits whatever the number of threads, run after run, and in calls that run side by side.
#include <oneapi/tbb/global_control.h>

#include <cmath>
#include <thread>

#include "support.h"

namespace moba::test {
namespace {

using Bits = std::vector<std::uint64_t>;

// Everything that the library can compute for a case, as bits. The selection is the gate's of the plan itself.
std::vector<std::pair<std::string, Bits>> everything(const Case& c, const Data& data, const Options& options) {
  std::vector<std::pair<std::string, Bits>> results;
  Runner run(c.problem(), options);
  Inputs inputs = data.inputs();
  results.emplace_back("forward", run.forward(inputs).bits());
  results.emplace_back("dense", run.dense(inputs).bits());
  std::pair<Array, Array> rotated;
  if (c.rope) {
    rotated = run.rope(inputs);
    results.emplace_back("rotated q", rotated.first.bits());
    results.emplace_back("rotated k", rotated.second.bits());
    inputs.q = std::as_const(rotated.first).tensor();
    inputs.k = std::as_const(rotated.second).tensor();
  }
  Array centroids = run.pool(inputs);
  results.emplace_back("centroids", centroids.bits());
  Chosen gated = run.gate(inputs, centroids);
  results.emplace_back("ids", gated.ids.bits());
  run.index(inputs, gated);
  results.emplace_back("offsets", gated.offsets.bits());
  const auto rows = gated.transpose();
  results.emplace_back("rows", Bits(rows.begin(), rows.end()));
  results.emplace_back("counts", gated.counts.bits());
  std::vector<Attention> partials;
  partials.push_back(run.attend(inputs, gated));
  results.emplace_back("attend", partials[0].bits());
  Chosen any(run.plan());
  choose_anything(c, any, 3);
  run.index(inputs, any);
  partials.push_back(run.attend(inputs, any));
  results.emplace_back("attend of any selection", partials[1].bits());
  results.emplace_back("merge", run.merge(partials).bits());
  return results;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const std::int64_t length = kSanitized ? 1200 : 2000;
  Rope rope;
  rope.rotary_dim = 16;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    all.push_back({.name = "one sequence",
                   .dtype = dtype,
                   .q_heads = 6,
                   .kv_heads = 2,
                   .head_dim = 16,
                   .q_lengths = {length},
                   .k_lengths = {length},
                   .config = {.block_size = 32, .top_k = 4},
                   .rope = rope});
    all.push_back({.name = "packed",
                   .dtype = dtype,
                   .q_heads = 3,
                   .head_dim = 24,
                   .q_lengths = {1, 700, 0, 90, 400, 3, 1000},
                   .k_lengths = {1, 800, 5, 70, 400, 0, 1000},
                   .config = {.block_size = 50, .top_k = 3},
                   .rope = rope});
    all.push_back({.name = "not causal",
                   .dtype = dtype,
                   .q_heads = 4,
                   .kv_heads = 4,
                   .head_dim = 16,
                   .q_lengths = {900},
                   .k_lengths = {1100},
                   .config = {.block_size = 1, .top_k = 20, .causal = false},
                   .rope = rope});
  }
  return all;
}

class Determinism : public ::testing::TestWithParam<Case> {};

TEST_P(Determinism, ThreadsAndRunsDoNotMatter) {
  // More threads than this machine may have cores.
  const oneapi::tbb::global_control control(oneapi::tbb::global_control::max_allowed_parallelism, 8);
  const Case& c = GetParam();
  Data data(c);
  // Values that are not finite, some in tiles where only a part of the rows sees them.
  for (std::int64_t j = 40; j < c.total_k(); j += 370) data.v.set(j, 0, j % c.head_dim, j % 3 == 0 ? NAN : INFINITY);
  data.k.set(c.total_k() / 2 + 7, 0, 3, NAN);
  for (const Options& kernel : cpu_kernels(c.dtype)) {
    // How the work is shared is the same code for every target: the best one and the bfloat16 products get all counts.
    const bool best = is_of_best_target(kernel);
    if (kSanitized && !best) continue;
    Options options = kernel;
    options.threads = 1;
    const auto expected = everything(c, data, options);
    const std::vector<int> counts = kSanitized ? std::vector{3, 8} : std::vector{1, 2, 3, 5, 8};
    for (const int threads : best ? counts : std::vector{3}) {
      options.threads = threads;
      const auto got = everything(c, data, options);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        EXPECT_TRUE(got[i].second == expected[i].second) << got[i].first << ", " << describe(options);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Determinism, ::testing::ValuesIn(cases()), case_name);

// A row's result is one chain of operations, whatever rows stand beside it: a batch gives the bits of its sequences,
// and the last queries on their own those of the whole.
TEST(Independence, RowsAreIndependent) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Case c{
        .dtype = dtype, .q_heads = 6, .kv_heads = 2, .head_dim = 32, .q_lengths = {130, 400}, .k_lengths = {130, 400}};
    c.config = {.block_size = 30, .top_k = 3};
    const Data data(c);
    for (const Options& options : cpu_kernels(dtype)) {
      SCOPED_TRACE(describe(options));
      const Attention whole = Runner(c.problem(), options).forward(data.inputs());
      for (const std::int64_t queries : {400, 100, 1}) {  // of the second sequence
        Case part = c;
        part.q_lengths = {queries};
        part.k_lengths = {400};
        Inputs inputs = data.inputs();
        inputs.cu_seqlens_q = inputs.cu_seqlens_k = {};
        const auto drop = [&](ConstTensor& t, std::int64_t tokens) {
          t.data = static_cast<const std::byte*>(t.data) +
                   tokens * t.stride[0] * static_cast<std::int64_t>(size_in_bytes(dtype));
          t.shape[0] -= tokens;
        };
        drop(inputs.q, 530 - queries);
        drop(inputs.k, 130);
        drop(inputs.v, 130);
        const Attention got = Runner(part.problem(), options).forward(inputs);
        for (std::int64_t i = 0; i < queries; ++i) {
          for (std::int64_t head = 0; head < 6; ++head) {
            ASSERT_EQ(got.lse.get(head, i), whole.lse.get(head, 530 - queries + i))
                << queries << " queries, token " << i;
            for (std::int64_t x = 0; x < 32; ++x)
              ASSERT_EQ(got.out.get(i, head, x), whole.out.get(530 - queries + i, head, x));
          }
        }
      }
    }
  }
}

// Whether forward selects is settled in the plan, by the longest sequence allowed: a short sequence, all of whose
// blocks are chosen, has the bits that attend gives it alone, whatever it is packed with.
TEST(Independence, ShortSequencesOfAPack) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool causal : {true, false}) {
      Case c{
          .dtype = dtype, .q_heads = 6, .kv_heads = 2, .head_dim = 32, .q_lengths = {90, 400}, .k_lengths = {90, 400}};
      c.config = {.block_size = 50, .top_k = 2, .causal = causal};
      const Data data(c);
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(::testing::Message() << c << ", " << describe(options));
        const Attention whole = Runner(c.problem(), options).forward(data.inputs());
        const auto expect_rows = [&](const Attention& got, std::int64_t first) {
          for (std::int64_t i = 0; i < got.out.dim(0); ++i) {
            for (std::int64_t head = 0; head < 6; ++head) {
              ASSERT_EQ(got.lse.get(head, i), whole.lse.get(head, first + i)) << "token " << first + i;
              for (std::int64_t x = 0; x < 32; ++x)
                ASSERT_EQ(got.out.get(i, head, x), whole.out.get(first + i, head, x)) << "token " << first + i;
            }
          }
        };
        for (const std::size_t s : {0, 1}) {
          const std::int64_t first = s == 0 ? 0 : 90, length = c.k_lengths[s];
          const auto rows_of = [&](ConstTensor t) {
            t.data = static_cast<const std::byte*>(t.data) +
                     first * t.stride[0] * static_cast<std::int64_t>(size_in_bytes(dtype));
            t.shape[0] = length;
            return t;
          };
          // The other sequence without its queries: the same plan but for their number.
          Case only = c;
          only.q_lengths[1 - s] = 0;
          const Array starts_q = starts(only.q_lengths);
          Inputs inputs = data.inputs();
          inputs.q = rows_of(inputs.q);
          inputs.cu_seqlens_q = starts_q.tensor();
          expect_rows(Runner(only.problem(), options).forward(inputs), first);
          // By itself, stage by stage.
          only.q_lengths = only.k_lengths = {length};
          inputs = {inputs.q, rows_of(inputs.k), rows_of(inputs.v), {}, {}};
          Runner alone(only.problem(), options);
          Chosen chosen = alone.select(inputs);
          expect_rows(alone.attend(inputs, chosen), first);
        }
      }
    }
  }
}

// One plan, shared; each call with a workspace and results of its own.
TEST(Independence, CallsMayRunSideBySide) {
  Rope rope;
  Case c{.q_heads = 6,
         .kv_heads = 2,
         .head_dim = 32,
         .q_lengths = {500, 1, 300},
         .k_lengths = {500, 1, 300},
         .config = {.block_size = 40, .top_k = 3},
         .rope = rope};
  const Data data(c);
  for (const int threads : {1, 2, 4}) {
    const Plan plan(c.problem(), {.threads = threads});
    const auto call = [&] {
      std::vector<std::byte> workspace(plan.workspace_bytes());
      Attention result(plan.problem()), full(plan.problem());
      Chosen chosen(plan);
      forward(plan, data.inputs(), result.outputs(), workspace);
      dense(plan, data.inputs(), full.outputs(), workspace);
      select(plan, data.inputs(), chosen.selection(), workspace);
      std::vector<Bits> bits{result.bits(), full.bits(), chosen.ids.bits(), chosen.offsets.bits()};
      return bits;
    };
    const std::vector<Bits> expected = call();
    std::vector<std::thread> callers;
    std::vector<int> wrong(6);
    for (std::size_t i = 0; i < wrong.size(); ++i) {
      callers.emplace_back([&, i] {
        for (int repeat = 0; repeat < (kSanitized ? 2 : 5); ++repeat) wrong[i] += call() != expected;
      });
    }
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(wrong, std::vector<int>(6)) << threads << " threads";
  }
}

}  // namespace
}  // namespace moba::test
