// rope: the cpu gives the reference's bits, and the reference what docs/spec.md section 3 says.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "support.h"

namespace moba::test {
namespace {

Rope scaled(RopeScaling scaling, RopeStyle style = RopeStyle::half_split, std::int64_t rotary_dim = 0) {
  Rope rope;
  rope.scaling = scaling;
  rope.style = style;
  rope.rotary_dim = rotary_dim;
  rope.factor = scaling == RopeScaling::none ? 1.0 : 8.0;
  rope.original_max_position = 256;
  return rope;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const RopeStyle style : {RopeStyle::half_split, RopeStyle::interleaved}) {
      const std::string suffix = style == RopeStyle::half_split ? " half-split" : " interleaved";
      for (const RopeScaling scaling :
           {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
        all.push_back({.name = "scaling " + std::to_string(static_cast<int>(scaling)) + suffix,
                       .dtype = dtype,
                       .head_dim = 64,
                       .q_lengths = {200},
                       .k_lengths = {200},
                       .rope = scaled(scaling, style)});
      }
      for (const std::int64_t d : {8, 9, 26, 100, 256}) {
        all.push_back({.name = "dims" + suffix,
                       .dtype = dtype,
                       .q_heads = 3,
                       .kv_heads = 3,
                       .head_dim = d,
                       .q_lengths = {70},
                       .k_lengths = {70},
                       .rope = scaled(RopeScaling::none, style, d / 2 * 2)});
        all.push_back({.name = "part of the dims" + suffix,
                       .dtype = dtype,
                       .q_heads = 4,
                       .kv_heads = 1,
                       .head_dim = d,
                       .q_lengths = {130},
                       .k_lengths = {130},
                       .rope = scaled(RopeScaling::yarn, style, d / 4 * 2),
                       .inputs = {.gap = 3, .swapped = true, .offset = 1},
                       .outputs = {.gap = 5, .offset = 3}});
      }
      all.push_back({.name = "packed, cached and negative positions" + suffix,
                     .dtype = dtype,
                     .head_dim = 24,
                     .q_lengths = {5, 0, 1, 150, 3, 130},
                     .k_lengths = {300, 7, 1, 20, 0, 130},
                     .rope = scaled(RopeScaling::llama3, style)});
    }
  }
  return all;
}

class RopeCases : public ::testing::TestWithParam<Case> {};

TEST_P(RopeCases, CpuEqualsReferenceBitForBit) {
  const Case& c = GetParam();
  const Data data(c);
  const auto expected = Runner(c.problem(), reference_options()).rope(data.inputs());
  for (const Options& options : cpu_kernels(c.dtype)) {
    SCOPED_TRACE(describe(options));
    const auto got = Runner(c.problem(), options).rope(data.inputs(), c.outputs);
    EXPECT_EQ(got.first.bits(), expected.first.bits());
    EXPECT_EQ(got.second.bits(), expected.second.bits());
    EXPECT_TRUE(got.first.surroundings_untouched() && got.second.surroundings_untouched());
  }
}

INSTANTIATE_TEST_SUITE_P(Rope, RopeCases, ::testing::ValuesIn(cases()), case_name);

// The frequency of a pair, and the factor on both cosine and sine, from the table in the spec.
struct Turn {
  double frequency, magnitude = 1;
};
Turn turn_of(const Rope& rope, std::int64_t r, std::int64_t i) {
  const double theta = std::pow(rope.base, -2.0 * static_cast<double>(i) / static_cast<double>(r)),
               pi = std::numbers::pi;
  const double length = rope.original_max_position;
  switch (rope.scaling) {
    case RopeScaling::none:
      return {theta};
    case RopeScaling::linear:
      return {theta / rope.factor};
    case RopeScaling::llama3: {
      const double u = length * theta / (2 * pi);
      const double w = (u - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      return {u > rope.high_freq_factor  ? theta
              : u < rope.low_freq_factor ? theta / rope.factor
                                         : (1 - w) * theta / rope.factor + w * theta};
    }
    case RopeScaling::yarn:
      break;
  }
  const auto dim = [&](double t) {
    return static_cast<double>(r) * std::log(length / (2 * pi * t)) / (2 * std::log(rope.base));
  };
  const double low = std::max(std::floor(dim(rope.beta_fast)), 0.0);
  double high = std::min(std::ceil(dim(rope.beta_slow)), static_cast<double>(r - 1));
  if (high == low) high += 0.001;
  const double w = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  return {w * theta / rope.factor + (1 - w) * theta, rope.attention_factor.value_or(0.1 * std::log(rope.factor) + 1)};
}

void expect_spec(const Case& c) {
  const Data data(c);
  const auto rotated = Runner(c.problem(), reference_options()).rope(data.inputs());
  const Rope& rope = *c.rope;
  const std::int64_t d = c.head_dim, r = rope.rotary_dim == 0 ? d : rope.rotary_dim;
  const std::int64_t shift = c.k_lengths[0] - c.q_lengths[0];
  const auto expect = [&](const Array& x, const Array& y, std::int64_t first_position) {
    for (std::int64_t token = 0; token < x.dim(0); ++token) {
      for (std::int64_t i = 0; i < r / 2; ++i) {
        const bool half = rope.style == RopeStyle::half_split;
        const std::int64_t a = half ? i : 2 * i, b = half ? i + r / 2 : 2 * i + 1;
        const Turn turn = turn_of(rope, r, i);
        const double angle = static_cast<double>(first_position + token) * turn.frequency;
        const double cos = turn.magnitude * std::cos(angle), sin = turn.magnitude * std::sin(angle);
        const double x0 = x.get(token, 0, a), x1 = x.get(token, 0, b);
        ASSERT_NEAR(y.get(token, 0, a), x0 * cos - x1 * sin, 1e-6) << "token " << token << ", pair " << i;
        ASSERT_NEAR(y.get(token, 0, b), x1 * cos + x0 * sin, 1e-6) << "token " << token << ", pair " << i;
      }
      for (std::int64_t i = r; i < d; ++i) ASSERT_EQ(y.get(token, 0, i), x.get(token, 0, i));
    }
  };
  expect(data.q, rotated.first, shift);
  expect(data.k, rotated.second, 0);
}

TEST(Rope, ReferenceFollowsTheSpec) {
  for (const RopeStyle style : {RopeStyle::half_split, RopeStyle::interleaved}) {
    for (const RopeScaling scaling : {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
      for (const std::int64_t q_length : {300, 40, 500}) {  // as many as keys, fewer, more: negative positions
        Case c{.q_heads = 1,
               .head_dim = 64,
               .q_lengths = {q_length},
               .k_lengths = {300},
               .rope = scaled(scaling, style, 48)};
        c.q_amplitude = 1;
        SCOPED_TRACE(::testing::Message() << c << ", scaling " << static_cast<int>(scaling));
        expect_spec(c);
        if (scaling == RopeScaling::yarn) {
          c.rope->attention_factor = 1.5;
          c.rope->base = 500000;
          expect_spec(c);
        }
      }
    }
  }
}

TEST(Rope, FarPositionsKeepTheirDigits) {
  Case c{.q_heads = 1, .head_dim = 16, .q_lengths = {40}, .k_lengths = {250'000}, .rope = scaled(RopeScaling::none)};
  if (kSanitized) c.k_lengths = {50'000};
  c.q_amplitude = 1;
  Data data(c);
  const auto expected = Runner(c.problem(), reference_options()).rope(data.inputs());
  Options options;
  options.threads = 2;
  const auto got = Runner(c.problem(), options).rope(data.inputs());
  EXPECT_EQ(got.first.bits(), expected.first.bits());
  EXPECT_EQ(got.second.bits(), expected.second.bits());
  for (std::int64_t i = 0; i < 8; ++i) {
    const double angle = static_cast<double>(c.k_lengths[0] - 1) * std::pow(10000.0, -static_cast<double>(i) / 8);
    const double x0 = data.q.get(39, 0, i), x1 = data.q.get(39, 0, i + 8);
    EXPECT_NEAR(got.first.get(39, 0, i), x0 * std::cos(angle) - x1 * std::sin(angle), 1e-6);
  }
}

TEST(Rope, UsesTheCallersTableAsItIs) {
  constexpr std::int64_t kPositions = 130, kPairs = 12;
  for (const Layout& layout : {Layout{}, Layout{.gap = 5, .offset = 1}}) {
    Array cos(DType::f32, {kPositions + 3, kPairs}, layout), sin(DType::f32, {kPositions + 3, kPairs}, layout);
    cos.fill(1, 3.0f);
    sin.fill(2, 3.0f);
    for (const RopeStyle style : {RopeStyle::half_split, RopeStyle::interleaved}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Case c{.dtype = dtype, .head_dim = 40, .q_lengths = {7, 60}, .k_lengths = {kPositions, 60}};
        c.rope = scaled(RopeScaling::yarn, style, 2 * kPairs);  // the scaling is not used
        c.rope->cos = std::as_const(cos).tensor();
        c.rope->sin = std::as_const(sin).tensor();
        const Data data(c);
        const auto expected = Runner(c.problem(), reference_options()).rope(data.inputs());
        for (std::int64_t i = 0; i < kPairs; ++i) {
          const bool half = style == RopeStyle::half_split;
          const std::int64_t a = half ? i : 2 * i, b = half ? i + kPairs : 2 * i + 1, p = kPositions - 1;
          const double x0 = data.q.get(6, 1, a), x1 = data.q.get(6, 1, b);
          const float y0 = static_cast<float>(x0 * cos.get(p, i) - x1 * sin.get(p, i));
          ASSERT_EQ(expected.first.get(6, 1, a), dtype == DType::f32 ? y0 : bf16_to_float(float_to_bf16(y0)));
        }
        for (const Options& options : cpu_kernels(dtype)) {
          const auto got = Runner(c.problem(), options).rope(data.inputs());
          EXPECT_EQ(got.first.bits(), expected.first.bits()) << describe(options);
          EXPECT_EQ(got.second.bits(), expected.second.bits()) << describe(options);
        }
      }
    }
  }
}

// Queries before the first key have no row in a table of the caller's. Which sequences have any shows in cu_seqlens
// only: the totals and the longest lengths do not tell.
TEST(Rope, TheCallersTableHasNoNegativePositions) {
  struct Lengths {
    std::vector<std::int64_t> q, k;
  };
  for (const auto& [q_lengths, k_lengths] :
       {Lengths{{10, 0}, {0, 10}}, {{3, 7}, {4, 6}}, {{0, 5, 5}, {0, 9, 1}}, {{11}, {10}}, {{2}, {0}}}) {
    Case c{.head_dim = 20, .q_lengths = q_lengths, .k_lengths = k_lengths, .config = {.block_size = 4, .top_k = 2}};
    const std::int64_t rows = std::ranges::max(k_lengths);
    Array cos(DType::f32, {rows, 10}, {.tight = true}), sin(DType::f32, {rows, 10}, {.tight = true});
    c.rope = Rope{};
    c.rope->cos = std::as_const(cos).tensor();
    c.rope->sin = std::as_const(sin).tensor();
    std::vector<Options> all = cpu_kernels(c.dtype);
    all.push_back(reference_options());
    for (const Options& options : all) {
      SCOPED_TRACE(::testing::Message() << c << ", " << describe(options));
      const Data data(c);
      const Plan plan(c.problem(), options);
      std::vector<std::byte> workspace(plan.workspace_bytes());
      Attention result(plan.problem());
      Array q(c.dtype, {c.total_q(), c.q_heads, 20}), k(c.dtype, {c.total_k(), c.kv_heads, 20});
      const auto expect_refused = [&](const char* function, auto call) {
        try {
          call();
          ADD_FAILURE() << function << " accepts it";
        } catch (const Error& error) {
          EXPECT_NE(std::string(error.what()).find("cu_seqlens_q"), std::string::npos)
              << function << ": " << error.what();
        }
      };
      expect_refused("rope", [&] { rope(plan, data.inputs(), q.tensor(), k.tensor(), workspace); });
      expect_refused("forward", [&] { forward(plan, data.inputs(), result.outputs(), workspace); });
      expect_refused("dense", [&] { dense(plan, data.inputs(), result.outputs(), workspace); });
      EXPECT_TRUE(result.out.untouched() && result.lse.untouched() && q.untouched() && k.untouched());
      Chosen chosen(plan);  // what does not rotate needs no rows
      EXPECT_NO_THROW(select(plan, data.inputs(), chosen.selection(), workspace));
      EXPECT_NO_THROW(attend(plan, data.inputs(), chosen.selection(), result.outputs(), workspace));
    }
  }
}

// forward rotates by itself what rope rotates beforehand.
TEST(Rope, ForwardRotates) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c{
        .dtype = dtype, .q_heads = 6, .kv_heads = 2, .head_dim = 32, .q_lengths = {90, 100}, .k_lengths = {200, 100}};
    c.rope = scaled(RopeScaling::llama3);
    Options options;
    options.threads = 2;
    const Data data(c);
    Runner run(c.problem(), options);
    const auto rotated = run.rope(data.inputs());
    const Attention whole = run.forward(data.inputs()), whole_dense = run.dense(data.inputs());
    Inputs inputs = data.inputs();
    inputs.q = rotated.first.tensor();
    inputs.k = rotated.second.tensor();
    c.rope.reset();
    Runner rest(c.problem(), options);
    EXPECT_EQ(whole.bits(), rest.forward(inputs).bits());
    EXPECT_EQ(whole_dense.bits(), rest.dense(inputs).bits());
  }
}

}  // namespace
}  // namespace moba::test
