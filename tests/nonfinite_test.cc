// NaN and infinity go where docs/spec.md section 9 lets them and nowhere else.
#include <algorithm>
#include <cmath>
#include <limits>

#include "support.h"

namespace moba::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// The bits of out and lse of one row.
std::vector<std::uint64_t> row_bits(const Attention& a, std::int64_t token, std::int64_t head) {
  std::vector<std::uint64_t> bits;
  for (std::int64_t x = 0; x < a.out.dim(2); ++x) {
    bits.push_back(a.out.dtype() == DType::f32 ? std::bit_cast<std::uint32_t>(a.out.get(token, head, x))
                                               : a.out.as<std::uint16_t>(token, head, x));
  }
  bits.push_back(std::bit_cast<std::uint32_t>(a.lse.get(head, token)));
  return bits;
}

enum class Poison { value, key, both };

void poison(Data& data, std::int64_t j, std::int64_t head, Poison where, float with) {
  for (const std::int64_t x : {std::int64_t{0}, data.k.dim(2) / 2, data.k.dim(2) - 1}) {
    if (where != Poison::key) data.v.set(j, head, x, with);
    if (where != Poison::value) data.k.set(j, head, x, with);
  }
}

// Poison in every key from `first` on: rows that do not see it keep the bits that they have without it, in every tile
// and at every place within a vector and a pair.
void expect_no_leak(const Case& c, std::int64_t first, Poison where, float with) {
  SCOPED_TRACE(::testing::Message() << c << ", from key " << first << ", poison " << static_cast<int>(where) << " "
                                    << with);
  const Data clean(c);
  Data bad(c);
  for (std::int64_t j = first; j < c.k_lengths[0]; ++j) poison(bad, j, 0, where, with);
  for (const Options& options : cpu_kernels(c.dtype)) {
    SCOPED_TRACE(describe(options));
    Runner run(c.problem(), options);
    const Attention forward_clean = run.forward(clean.inputs()), forward_bad = run.forward(bad.inputs());
    const Attention dense_clean = run.dense(clean.inputs()), dense_bad = run.dense(bad.inputs());
    const std::int64_t shift = c.k_lengths[0] - c.q_lengths[0];
    for (std::int64_t token = 0; token < first - shift; ++token) {
      for (std::int64_t head = 0; head < c.q_heads; ++head) {
        ASSERT_EQ(row_bits(forward_bad, token, head), row_bits(forward_clean, token, head))
            << "token " << token << ", head " << head;
        ASSERT_EQ(row_bits(dense_bad, token, head), row_bits(dense_clean, token, head))
            << "token " << token << ", head " << head;
      }
    }
    // Rows that do see it are as bad as in float64.
    Chosen chosen = run.select(bad.inputs());
    EXPECT_TRUE(close(forward_bad, attend_f64(run, bad.inputs(), chosen), c.dtype));
    EXPECT_TRUE(close(dense_bad, dense_f64(run, bad.inputs()), c.dtype));
  }
}

TEST(NonFinite, FutureKeysAndValuesDoNotLeak) {
  for (const DType dtype : kTypes) {
    for (const Poison where : {Poison::value, Poison::key, Poison::both}) {
      for (const float with : {kNaN, kInf, -kInf}) {
        for (const std::int64_t first : {1, 2, 15, 16, 17, 31, 38, 47, 61}) {
          expect_no_leak({.dtype = dtype, .q_heads = 3, .head_dim = 20, .q_lengths = {62}, .k_lengths = {62}}, first,
                         where, with);
        }
        if (kSanitized && with != kNaN) continue;
        expect_no_leak({.dtype = dtype,
                        .head_dim = 16,
                        .q_lengths = {90},
                        .k_lengths = {300},
                        .config = {.block_size = 150, .top_k = 1}},
                       253, where, with);
        expect_no_leak({.dtype = dtype,
                        .q_heads = 1,
                        .head_dim = 9,
                        .q_lengths = {300},
                        .k_lengths = {300},
                        .config = {.block_size = 64, .top_k = 3}},
                       129, where, with);
      }
    }
  }
}

// Outputs so small that they underflow: whether zeros were added for masked keys may not even show in a sign.
TEST(NonFinite, MaskedValuesLeaveNoSign) {
  Case c{.q_heads = 3, .head_dim = 20, .q_lengths = {62}, .k_lengths = {62}};
  Data before(c), after(c);
  for (std::int64_t j = 0; j < 62; ++j) {
    for (std::int64_t x = 0; x < 20; ++x) {
      const float value = (j + x) % 2 == 0 ? 0.0f : -std::numeric_limits<float>::denorm_min();
      before.v.set(j, 0, x, j < 38 ? value : -1.0f);
      after.v.set(j, 0, x, j < 38 ? value : 1.0f);
    }
  }
  for (const Options& options : cpu_kernels(c.dtype)) {
    Runner run(c.problem(), options);
    const Attention expected = run.forward(before.inputs()), got = run.forward(after.inputs());
    for (std::int64_t token = 0; token < 38; ++token) {
      for (std::int64_t head = 0; head < 3; ++head) {
        ASSERT_EQ(row_bits(got, token, head), row_bits(expected, token, head))
            << describe(options) << ", token " << token;
      }
    }
  }
}

TEST(NonFinite, OtherSequencesHeadsAndBlocksDoNotLeak) {
  for (const DType dtype : kTypes) {
    for (const bool causal : {true, false}) {
      Case c{.dtype = dtype,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = 24,
             .q_lengths = {40, 50, 33},
             .k_lengths = {40, 50, 33}};
      c.config = {.block_size = 8, .top_k = 2, .causal = causal};
      const Data clean(c);
      Data bad(c);
      for (std::int64_t j = 40; j < 90; ++j) poison(bad, j, 1, Poison::both, kNaN);
      Data bad_values(c);  // of block 1 of every sequence: the choice stays as it is
      for (const std::int64_t first : {0, 40, 90}) {
        for (std::int64_t j = first + 8; j < first + 16; ++j) poison(bad_values, j, 0, Poison::value, kInf);
      }
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(describe(options));
        Runner run(c.problem(), options);
        Chosen chosen = run.select(clean.inputs());
        const Attention expected = run.forward(clean.inputs()), got = run.forward(bad.inputs());
        const Attention dense_expected = run.dense(clean.inputs()), dense_got = run.dense(bad.inputs());
        const Attention got_values = run.forward(bad_values.inputs());
        for (std::int64_t token = 0; token < 123; ++token) {
          for (std::int64_t head = 0; head < 4; ++head) {
            const bool hit = token >= 40 && token < 90 && head >= 2;
            ASSERT_EQ(row_bits(got, token, head) == row_bits(expected, token, head), !hit) << token << " " << head;
            ASSERT_EQ(row_bits(dense_got, token, head) == row_bits(dense_expected, token, head), !hit)
                << token << " " << head;
            if (hit) {
              ASSERT_TRUE(std::isnan(got.out.get(token, head, 0)) && std::isnan(got.lse.get(head, token)));
            }
            const auto blocks = chosen.row(token, head);
            if (head >= 2 || !std::ranges::count(blocks, 1)) {
              ASSERT_EQ(row_bits(got_values, token, head), row_bits(expected, token, head)) << token << " " << head;
            }
          }
        }
      }
    }
  }
}

TEST(NonFinite, NanInOneQueryStaysInItsRow) {
  for (const DType dtype : kTypes) {
    Case c{.dtype = dtype, .q_heads = 4, .kv_heads = 2, .head_dim = 24, .q_lengths = {70}, .k_lengths = {70}};
    const Data clean(c);
    Data bad(c);
    bad.q.set(33, 2, 23, kNaN);
    bad.q.set(50, 1, 0, kInf);
    for (const Options& options : cpu_kernels(dtype)) {
      SCOPED_TRACE(describe(options));
      Runner run(c.problem(), options);
      const Attention expected = run.forward(clean.inputs()), got = run.forward(bad.inputs());
      for (std::int64_t token = 0; token < 70; ++token) {
        for (std::int64_t head = 0; head < 4; ++head) {
          const bool hit = (token == 33 && head == 2) || (token == 50 && head == 1);
          ASSERT_EQ(row_bits(got, token, head) == row_bits(expected, token, head), !hit) << token << " " << head;
        }
      }
      EXPECT_TRUE(std::isnan(got.out.get(33, 2, 5)));
      EXPECT_TRUE(std::isnan(got.lse.get(2, 33)));
    }
  }
}

// A key whose score is -inf has no weight, whatever else the row sees; a row of such keys is empty, even if their
// values are NaN.
TEST(NonFinite, ScoresOfMinusInfinityWeighNothing) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t b : {16, 5, 200}) {
      Case c{.dtype = dtype,
             .head_dim = 16,
             .q_lengths = {200},
             .k_lengths = {200},
             .config = {.block_size = b, .top_k = 2}};
      Data data(c);
      for (std::int64_t token = 0; token < 200; ++token) {
        for (std::int64_t head = 0; head < 2; ++head) data.q.set(token, head, 3, 1.0f);
      }
      Random random(8);
      for (std::int64_t j = 0; j < 200; ++j) {
        if (j < 40 || (j > 150 && random.one_in(3))) data.k.set(j, 0, 3, -kInf);
        if (j < 40) data.v.set(j, 0, 5, kNaN);
      }
      Runner reference(c.problem(), reference_options());
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(::testing::Message() << describe(options) << ", block " << b);
        Runner run(c.problem(), options);
        Chosen chosen = run.select(data.inputs());
        const Attention got = run.forward(data.inputs());
        for (std::int64_t token = 0; token < 40; ++token) {
          ASSERT_EQ(got.lse.get(1, token), -kInf) << token;
          for (std::int64_t x = 0; x < 16; ++x) ASSERT_EQ(got.out.get(token, 1, x), 0.0f) << token << " " << x;
        }
        EXPECT_TRUE(close(reference.forward(data.inputs()), attend_f64(reference, data.inputs(), chosen), dtype));
        Data no_nan(c);
        no_nan.q = data.q;
        no_nan.k = data.k;
        EXPECT_TRUE(close(run.forward(no_nan.inputs()), attend_f64(reference, no_nan.inputs(), chosen), dtype));
      }
    }
  }
}

TEST(NonFinite, InfiniteScoresMakeTheRowNan) {
  for (const DType dtype : kTypes) {
    Case c{.dtype = dtype, .q_heads = 1, .head_dim = 16, .q_lengths = {40}, .k_lengths = {40}};
    Data data(c);
    for (std::int64_t token = 0; token < 40; ++token) data.q.set(token, 0, 2, 1.0f);
    data.k.set(20, 0, 2, kInf);
    for (const Options& options : cpu_kernels(dtype)) {
      const Attention got = Runner(c.problem(), options).dense(data.inputs());
      for (std::int64_t token = 0; token < 40; ++token) {
        ASSERT_EQ(std::isnan(got.lse.get(0, token)), token >= 20) << describe(options) << ", token " << token;
        ASSERT_EQ(std::isnan(got.out.get(token, 0, 7)), token >= 20) << describe(options) << ", token " << token;
      }
    }
  }
}

// A visible value that is infinite or NaN changes its own dimension only.
TEST(NonFinite, ValuesStayInTheirDimension) {
  for (const DType dtype : kTypes) {
    Case c{.dtype = dtype, .head_dim = 40, .q_lengths = {100}, .k_lengths = {100}};
    const Data clean(c);
    Data bad(c);
    bad.v.set(30, 0, 39, kInf);
    bad.v.set(50, 0, 17, kNaN);
    for (const Options& options : cpu_kernels(dtype)) {
      Runner run(c.problem(), options);
      const Attention expected = run.dense(clean.inputs()), got = run.dense(bad.inputs());
      EXPECT_EQ(got.lse.bits(), expected.lse.bits()) << describe(options);
      for (std::int64_t token = 0; token < 100; ++token) {
        for (std::int64_t x = 0; x < 40; ++x) {
          const float is = got.out.get(token, 1, x);
          if (x == 39 && token >= 30) {
            ASSERT_FALSE(std::isfinite(is));
          } else if (x == 17 && token >= 50) {
            ASSERT_TRUE(std::isnan(is));
          } else {
            ASSERT_EQ(is, expected.out.get(token, 1, x))
                << describe(options) << ", token " << token << ", dimension " << x;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
