// merge: partial results over disjoint keys give what attention over all of them gives.
#include <cmath>
#include <limits>

#include "support.h"

namespace moba::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<Options> all_kernels(DType dtype) {
  std::vector<Options> all = cpu_kernels(dtype);
  all.push_back(reference_options());
  return all;
}

// Partials are rounded to 16 bits before they are merged, and once more after.
double extra(DType dtype) { return dtype == DType::f32 ? 0 : tolerance(dtype); }

// The formula of docs/spec.md section 8 in float64.
reference::Rows by_hand(const std::vector<Attention>& partials, std::int64_t tokens, std::int64_t heads,
                        std::int64_t d) {
  reference::Rows rows{std::vector<double>(static_cast<std::size_t>(tokens * heads * d)),
                       std::vector<double>(static_cast<std::size_t>(tokens * heads))};
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      double most = -INFINITY, sum = 0;
      for (const Attention& p : partials) most = std::max<double>(most, p.lse.get(head, token));
      for (const Attention& p : partials) {
        if (p.lse.get(head, token) == -kInf) continue;
        const double weight = std::exp(p.lse.get(head, token) - most);
        sum += weight;
        for (std::int64_t x = 0; x < d; ++x)
          rows.out[(token * heads + head) * d + x] += weight * p.out.get(token, head, x);
      }
      rows.lse[head * tokens + token] = sum == 0 ? -INFINITY : most + std::log(sum);
      for (std::int64_t x = 0; x < d && sum > 0; ++x) rows.out[(token * heads + head) * d + x] /= sum;
    }
  }
  return rows;
}

TEST(Merge, FollowsTheSpec) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t d : {8, 33, 256}) {
      for (const int count : {0, 1, 2, 3, 7}) {
        Case c{.dtype = dtype, .q_heads = 6, .kv_heads = 3, .head_dim = d, .q_lengths = {70}, .k_lengths = {70}};
        std::vector<Attention> partials;
        for (int i = 0; i < count; ++i) {
          Attention& partial = partials.emplace_back(c.problem(), Layout{.gap = i, .swapped = i % 2 == 1, .offset = i});
          partial.out.fill(static_cast<std::uint64_t>(i));
          partial.lse.fill(static_cast<std::uint64_t>(i) + 100, i == 3 ? 1000.0f : 5.0f);
          for (std::int64_t token = i; token < 70; token += 3) {  // saw no key; what it wrote means nothing
            partial.lse.set(1, token, 0, -kInf);
            partial.out.set(token, 1, 2, kNaN);
          }
        }
        const reference::Rows expected = by_hand(partials, 70, 6, d);
        for (const Options& options : all_kernels(dtype)) {
          SCOPED_TRACE(describe(options) + ", " + std::to_string(count) + " partials");
          const Attention got = Runner(c.problem(), options).merge(partials, {.gap = 3, .offset = 1});
          EXPECT_TRUE(close(got, expected, dtype));
          EXPECT_TRUE(got.surroundings_untouched());
        }
      }
    }
  }
}

TEST(Merge, OfOnePartialIsThatPartial) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c{.dtype = dtype, .q_heads = 2, .head_dim = 19, .q_lengths = {50}, .k_lengths = {40}};
    const Data data(c);
    for (const Options& options : all_kernels(dtype)) {
      Runner run(c.problem(), options);
      std::vector<Attention> partials{run.forward(data.inputs()), run.forward(data.inputs())};
      partials[1].lse.fill_value(-kInf);
      partials[1].out.fill_value(kNaN);
      const Attention merged = run.merge(partials);
      EXPECT_EQ(merged.out.bits(), partials[0].out.bits()) << describe(options);
      EXPECT_EQ(merged.lse.bits(), partials[0].lse.bits()) << describe(options);
    }
  }
}

// Of three partials, in the order given: another order of float32 additions would show.
TEST(Merge, AddsUpInTheOrderGiven) {
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {1}, .k_lengths = {1}};
  std::vector<Attention> partials;
  for (const float out : {1.0f, 0x1p25f, -0x1p25f}) {
    Attention& partial = partials.emplace_back(c.problem());
    partial.out.fill_value(out);
    partial.lse.fill_value(0.0f);
  }
  for (const Options& options : cpu_kernels(DType::f32)) {
    EXPECT_EQ(Runner(c.problem(), options).merge(partials).out.get(0, 0, 0), 0.0f) << describe(options);  // 1 is lost
  }
  std::swap(partials[0], partials[2]);
  for (const Options& options : cpu_kernels(DType::f32)) {
    EXPECT_NEAR(Runner(c.problem(), options).merge(partials).out.get(0, 0, 0), 1.0f / 3, 1e-6) << describe(options);
  }
}

TEST(Merge, NanAndInfinityOfAPartialReachTheResult) {
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {4}, .k_lengths = {4}};
  std::vector<Attention> partials;
  for (int i = 0; i < 2; ++i) {
    Attention& partial = partials.emplace_back(c.problem());
    partial.out.fill(static_cast<std::uint64_t>(i));
    partial.lse.fill_value(0.5f);
  }
  partials[1].out.set(0, 0, 3, kNaN);
  partials[0].out.set(1, 0, 3, kInf);
  partials[1].lse.set(0, 2, 0, kNaN);
  partials[0].lse.set(0, 3, 0, kInf);
  for (const Options& options : all_kernels(DType::f32)) {
    SCOPED_TRACE(describe(options));
    const Attention got = Runner(c.problem(), options).merge(partials);
    EXPECT_TRUE(std::isnan(got.out.get(0, 0, 3)));
    EXPECT_TRUE(std::isfinite(got.out.get(0, 0, 2)));
    EXPECT_EQ(got.out.get(1, 0, 3), kInf);
    EXPECT_TRUE(std::isnan(got.lse.get(0, 2)) && std::isnan(got.out.get(2, 0, 0)));
    EXPECT_TRUE(std::isnan(got.out.get(3, 0, 0)));
  }
}

// Full attention over the keys in three pieces, without a mask.
TEST(Merge, PiecesOfTheKeysMakeTheWhole) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c{.dtype = dtype, .q_heads = 4, .kv_heads = 2, .head_dim = 48, .q_lengths = {60}, .k_lengths = {250}};
    c.config = {.block_size = 16, .top_k = 2, .causal = false};
    const Data data(c);
    for (const Options& options : all_kernels(dtype)) {
      Runner whole(c.problem(), options);
      std::vector<Attention> partials;
      for (const auto& [begin, end] : {std::pair{0, 100}, {100, 101}, {101, 250}}) {
        Case piece = c;
        piece.k_lengths = {end - begin};
        Inputs inputs = data.inputs();
        for (ConstTensor* t : {&inputs.k, &inputs.v}) {
          t->shape[0] = end - begin;
          t->data = static_cast<const std::byte*>(t->data) +
                    begin * t->stride[0] * static_cast<std::int64_t>(size_in_bytes(dtype));
        }
        partials.push_back(Runner(piece.problem(), options).dense(inputs));
      }
      EXPECT_TRUE(close(whole.merge(partials), dense_f64(whole, data.inputs()), dtype, extra(dtype)))
          << describe(options);
    }
  }
}

// The blocks of each row dealt out to two selections: rows with none in one of them are empty there.
TEST(Merge, PiecesOfTheSelectionMakeTheWhole) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const bool causal : {true, false}) {
      Case c{
          .dtype = dtype, .q_heads = 6, .kv_heads = 2, .head_dim = 32, .q_lengths = {130, 20}, .k_lengths = {130, 90}};
      c.config = {.block_size = 10, .top_k = 4, .causal = causal};
      const Data data(c);
      for (const Options& options : all_kernels(dtype)) {
        Runner run(c.problem(), options);
        Chosen all = run.select(data.inputs()), odd(run.plan()), even(run.plan());
        for (std::int64_t token = 0; token < 150; ++token) {
          for (std::int64_t head = 0; head < 6; ++head) {
            std::vector<std::int32_t> odds, evens;
            for (const std::int32_t id : all.row(token, head)) (id % 2 ? odds : evens).push_back(id);
            odd.set_row(token, head, odds);
            even.set_row(token, head, evens);
          }
        }
        run.index(data.inputs(), odd);
        run.index(data.inputs(), even);
        std::vector<Attention> partials{run.attend(data.inputs(), odd), run.attend(data.inputs(), even)};
        EXPECT_TRUE(close(run.merge(partials), attend_f64(run, data.inputs(), all), dtype, extra(dtype)))
            << describe(options);
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
