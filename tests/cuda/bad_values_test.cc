// What only the device can see and no call can refuse: tables that lie, ids that are wrong, NaN and infinity. They give
// NaN where docs/spec.md and moba/attention.h say, and no memory is touched that was not given.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cases.h"
#include "cuda_test.h"

namespace moba::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

::testing::AssertionResult all_nan(const Attention& a) {
  for (const Array* array : {&a.out, &a.lse}) {
    const auto numbers = array->numbers();
    const auto found = std::ranges::find_if_not(numbers, [](double x) { return std::isnan(x); });
    if (found == numbers.end()) continue;
    return ::testing::AssertionFailure() << (array == &a.out ? "out" : "lse") << ", number " << found - numbers.begin()
                                         << " of " << numbers.size() << ": " << *found;
  }
  return ::testing::AssertionSuccess();
}

class CudaBadValues : public CudaTest {};

TEST_F(CudaBadValues, SmallTablesThatLie) {
  const std::vector<Lie> lies = tables_that_lie();
  for (const std::int64_t d : {32, 128}) {
    Case c{
        .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {60, 39}, .k_lengths = {75, 99}};
    c.config = {.block_size = 16, .top_k = 3, .causal = d == 128};
    c.rope = Rope{};
    for (const std::string& family : families(c.problem())) {
      CudaRunner run(c.problem(), cuda_options(family));
      Data data(c);
      const auto good = run.forward(data.inputs()).bits();
      const Array centroids = run.pool(data.inputs());
      Chosen chosen = run.select(data.inputs());
      for (std::size_t i = 0; i < lies.size(); ++i) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family << ", lie " << i);
        Data bad(c);
        lies[i].tell(bad);
        EXPECT_TRUE(all_nan(run.forward(bad.inputs())));
        EXPECT_TRUE(all_nan(run.dense(bad.inputs())));
        EXPECT_TRUE(all_nan(run.attend(bad.inputs(), chosen)));
        run.rope(bad.inputs());
        run.pool(bad.inputs());
        run.gate(bad.inputs(), centroids);
        EXPECT_TRUE(run.select(bad.inputs()).surroundings_untouched());
        Chosen indexed = chosen;
        run.index(bad.inputs(), indexed);
        EXPECT_EQ(indexed.offsets.as<std::int64_t>(indexed.offsets.dim(0) - 1), 0);
      }
      EXPECT_TRUE(run.forward(data.inputs()).bits() == good);  // the next call is as good as any
    }
  }
}

// Where a kernel of its own looks through the table.
TEST_F(CudaBadValues, LongTablesThatLie) {
  const Case c = many_sequences();
  for (const std::int64_t at : {0, 1, 1023, 1024, 2999, 3000}) {
    for (const bool q : {true, false}) {
      Data bad(c);
      (q ? *bad.cu_seqlens_q : *bad.cu_seqlens_k).as<std::int32_t>(at) += at == 3000 ? 1 : -1000;
      CudaRunner run(c.problem());
      EXPECT_TRUE(all_nan(run.forward(bad.inputs()))) << "entry " << at;
      EXPECT_TRUE(all_nan(run.dense(bad.inputs()))) << "entry " << at;
    }
  }
}

// A row with such ids is chosen by no block and comes out as NaN; the others are as they were.
TEST_F(CudaBadValues, SmallWrongIds) {
  const std::vector<std::vector<std::int32_t>> wrong{{2, 1, -1}, {1, 1, 2},   {0, 5, -1},   {0, kMost, -1},
                                                     {-2, 1, 2}, {-1, 1, -1}, {1, -2, -1},  {-kMost - 1, -1, -1},
                                                     {0, 2, 2},  {0, -1, 2},  {1, 2, kMost}};
  for (const std::int64_t d : {64, 128, 96}) {
    for (const bool shared : {false, true}) {
      Case c{.dtype = DType::bf16,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = d,
             .q_lengths = {60, 39},
             .k_lengths = {75, 99}};
      c.config = {.block_size = 16, .top_k = 3};
      const Data data(c);
      const std::int64_t group = shared ? 2 : 1;
      for (const std::string& family : families(c.problem())) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family << (shared ? ", shared" : ""));
        CudaRunner run(c.problem(), cuda_options(family));
        Chosen good(run.plan(), {}, shared);
        choose_anything(c, good, run_seed());
        Chosen bad = good, emptied = good;
        const auto is_bad = [&](std::int64_t token, std::int64_t head) {
          return token % 5 == 2 && head % good.ids.dim(1) == 1;
        };
        std::size_t next = 0;
        for (std::int64_t token = 0; token < 99; ++token) {
          if (!is_bad(token, 1)) continue;
          const auto& row =
              wrong[next++ % wrong.size()];  // 75 keys are 5 blocks, 99 are 7: block 5 is none of the first's
          const bool fine = token >= 60 && row[1] == 5;
          for (std::int64_t slot = 0; slot < 3; ++slot) {
            bad.ids.as<std::int32_t>(token, 1, slot) = fine ? -3 : row[static_cast<std::size_t>(slot)];
          }
          emptied.set_row(token, 1, {});
        }
        const Attention expected = run.attend(data.inputs(), good), got = run.attend(data.inputs(), bad);
        for (std::int64_t token = 0; token < 99; ++token) {
          for (std::int64_t head = 0; head < 4; ++head) {
            const bool nan = is_bad(token, head / group);
            ASSERT_EQ(std::isnan(got.lse.get(head, token)), nan) << "token " << token << ", head " << head;
            for (std::int64_t x = 0; x < d; ++x) {
              ASSERT_TRUE(nan ? std::isnan(got.out.get(token, head, x))
                              : got.out.get(token, head, x) == expected.out.get(token, head, x))
                  << "token " << token << ", head " << head;
            }
          }
        }
        run.index(data.inputs(), bad);
        Runner(c.problem(), reference_options()).index(data.inputs(), emptied);
        EXPECT_TRUE(bad.offsets.bits() == emptied.offsets.bits());
        EXPECT_TRUE(bad.transpose() == emptied.transpose());
      }
    }
  }
}

// Queries before the first key have no row in a table of the caller's: such cu_seqlens are not as they must be.
TEST_F(CudaBadValues, SmallRopeTableWithoutNegativePositions) {
  const FewPositions few;
  const Case& c = few.c;
  const Data data(c);
  CudaRunner run(c.problem());
  EXPECT_TRUE(all_nan(run.forward(data.inputs())));
}

enum class Poison { value, key, both };

// Elements that float64 makes NaN of 0 times infinity, by a key of score -inf, may be that or not (docs/spec.md,
// section 9): both become 0.
void forgive_weight_zero(Attention& got, reference::Rows& expected) {
  const std::int64_t tokens = got.out.dim(0), heads = got.out.dim(1), d = got.out.dim(2);
  for (std::int64_t row = 0; row < tokens * heads; ++row) {
    if (!std::isfinite(expected.lse[row % heads * tokens + row / heads])) continue;
    for (std::int64_t x = 0; x < d; ++x) {
      if (!std::isnan(expected.out[row * d + x])) continue;
      expected.out[row * d + x] = 0;
      got.out.set(row / heads, row % heads, x, 0);
    }
  }
}

// Poison in every key from `first` on: rows are as good or bad as in float64.
void expect_no_leak(const Case& c, std::int64_t first, Poison where, float with) {
  SCOPED_TRACE(::testing::Message() << c << ", from key " << first << ", poison " << static_cast<int>(where) << " "
                                    << with);
  Data bad(c);
  for (std::int64_t j = first; j < c.total_k(); ++j) {
    for (const std::int64_t x : {std::int64_t{0}, c.head_dim / 2, c.head_dim - 1}) {
      if (where != Poison::key) bad.v.set(j, 0, x, with);
      if (where != Poison::value) bad.k.set(j, 0, x, with);
    }
  }
  Runner reference(c.problem(), reference_options());
  const bool forgive = where == Poison::both && std::isinf(with);
  const auto expect_near = [&](Attention got, reference::Rows expected, const char* what) {
    if (forgive) forgive_weight_zero(got, expected);
    EXPECT_TRUE(near(got, expected, c.dtype)) << what;
  };
  const reference::Rows dense = dense_f64(reference, bad.inputs());
  for (const std::string& family : families(c.problem())) {
    SCOPED_TRACE(family);
    CudaRunner run(c.problem(), cuda_options(family));
    Chosen chosen = run.select(bad.inputs());
    expect_near(run.forward(bad.inputs()), attend_f64(reference, bad.inputs(), chosen), "forward");
    expect_near(run.dense(bad.inputs()), dense, "dense");
  }
}

TEST_F(CudaBadValues, FutureKeysAndValuesDoNotLeak) {
  for (const auto& [d, b] : {std::pair{64, 16}, {64, 48}, {128, 128}, {128, 144}, {96, 32}}) {
    for (const Poison where : {Poison::value, Poison::key, Poison::both}) {
      for (const float with : {kNaN, kInf, -kInf}) {
        for (const std::int64_t first : {1, 16, 31, 127, 130, 200}) {
          Case c{.dtype = first % 2 == 0 ? DType::bf16 : DType::f16, .q_heads = 3, .head_dim = d, .q_lengths = {230}};
          c.k_lengths = {first == 127 ? 300 : 230};
          c.config = {.block_size = b, .top_k = 2};
          expect_no_leak(c, first, where, with);
        }
      }
    }
  }
}

TEST_F(CudaBadValues, OtherSequencesDoNotLeak) {
  for (const auto& [d, b] : {std::pair{64, 16}, {128, 128}, {128, 144}, {96, 32}}) {
    for (const bool causal : {true, false}) {
      Case c{
          .dtype = DType::bf16, .q_heads = 2, .head_dim = d, .q_lengths = {40, 150, 33}, .k_lengths = {140, 150, 33}};
      c.config = {.block_size = b, .top_k = 2, .causal = causal};
      for (const std::int64_t first : {140, 290}) expect_no_leak(c, first, Poison::both, kNaN);
    }
  }
}

// A key whose score is -inf has no weight, whatever else the row sees; a row of such keys is empty.
TEST_F(CudaBadValues, ScoresOfMinusInfinityWeighNothing) {
  for (const auto& [d, b] : {std::pair{64, 16}, {64, 64}, {128, 144}, {96, 32}}) {
    Case c{.dtype = DType::bf16,
           .head_dim = d,
           .q_lengths = {200},
           .k_lengths = {200},
           .config = {.block_size = b, .top_k = 2}};
    Data data(c);
    Random random(run_seed());
    for (std::int64_t token = 0; token < 200; ++token) {
      for (std::int64_t head = 0; head < 2; ++head) data.q.set(token, head, 3, 1.0f);
      if (token < 40 || (token > 150 && random.one_in(3))) data.k.set(token, 0, 3, -kInf);
      if (token < 40) data.v.set(token, 0, 5, kNaN);
    }
    Runner reference(c.problem(), reference_options());
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      CudaRunner run(c.problem(), cuda_options(family));
      Chosen chosen = run.select(data.inputs());
      EXPECT_TRUE(near(run.forward(data.inputs()), attend_f64(reference, data.inputs(), chosen), c.dtype));
      EXPECT_TRUE(near(run.dense(data.inputs()), dense_f64(reference, data.inputs()), c.dtype)) << "dense";
    }
  }
}

}  // namespace
}  // namespace moba::test
