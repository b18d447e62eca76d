// pool, rope, index and merge of the cuda backend against the reference.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cases.h"
#include "cuda_test.h"

namespace moba::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class CudaPool : public CudaTest {};
class CudaRope : public CudaTest {};
class CudaIndex : public CudaTest {};
class CudaMerge : public CudaTest {};

void expect_pooled(const Case& c, const Data& data) {
  SCOPED_TRACE(::testing::Message() << c);
  const Array expected = Runner(c.problem(), reference_options()).pool(data.inputs());
  const Array got = CudaRunner(c.problem()).pool(data.inputs(), c.outputs);
  EXPECT_TRUE(got.bits() == expected.bits());
  EXPECT_TRUE(got.surroundings_untouched());
}

TEST_F(CudaPool, Small) {
  for (const Case& c : small_cases()) expect_pooled(c, Data(c));
}

TEST_F(CudaPool, EqualsTheReferenceBitForBit) {
  std::uint64_t seed = run_seed() * 1000;
  for (const std::int64_t d : kHeadDims) {
    for (const std::int64_t b : {16, 48, 64, 80, 128, 144, 512, 1024, 8192}) {
      for (const std::int64_t tail : {0, 1, 15}) {
        Case c{.name = "pool", .dtype = kTypes[seed % 2], .q_heads = 3, .kv_heads = 3, .head_dim = d, .seed = ++seed};
        c.q_lengths = {0, 0, 0, 0};
        c.k_lengths = {std::min<std::int64_t>(2 * b, 3000) + tail, 0, 1, b};
        c.config = {.block_size = b, .top_k = 1};
        if (tail == 1)
          c.inputs = {.gap = 24, .swapped = true, .offset = 8}, c.outputs = {.gap = 8, .swapped = b % 32 == 0};
        expect_pooled(c, Data(c));
      }
    }
  }
}

// Sums whose order shows: big and small numbers alternate.
TEST_F(CudaPool, KeepsTheOrderOfSummation) {
  for (const std::int64_t b : {64, 208, 1024}) {
    Case c{
        .dtype = DType::bf16, .head_dim = 64, .q_lengths = {0}, .k_lengths = {2 * b + 70}, .config = {.block_size = b}};
    Data data(c);
    Random random(run_seed());
    for (std::int64_t j = 0; j < c.k_lengths[0]; ++j) {
      for (std::int64_t x = 0; x < 64; ++x)
        data.k.set(j, 0, x, random.uniform() * std::ldexp(1.0f, static_cast<int>(random.integer(0, 30))));
    }
    expect_pooled(c, data);
  }
}

TEST_F(CudaPool, NonFiniteKeysStayInTheirBlockAndDimension) {
  Case c{.dtype = DType::bf16, .head_dim = 32, .q_lengths = {0}, .k_lengths = {300}, .config = {.block_size = 96}};
  Data data(c);
  data.k.set(3, 0, 2, kNaN);
  data.k.set(100, 0, 19, kInf);
  data.k.set(240, 0, 7, kInf);
  data.k.set(241, 0, 7, -kInf);
  const Array got = CudaRunner(c.problem()).pool(data.inputs());
  for (std::int64_t b = 0; b < 4; ++b) {
    for (std::int64_t x = 0; x < 32; ++x) {
      const float is = got.get(b, 0, x);
      const bool nan = (b == 0 && x == 2) || (b == 2 && x == 7), infinite = b == 1 && x == 19;
      EXPECT_TRUE(nan ? std::isnan(is) : infinite ? is == kInf : std::isfinite(is)) << b << " " << x << " " << is;
    }
  }
}

std::vector<Case> rope_cases() {
  std::vector<Case> all;
  for (const RopeStyle style : {RopeStyle::half_split, RopeStyle::interleaved}) {
    for (const RopeScaling scaling : {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
      for (const std::int64_t d : kHeadDims) {
        for (const std::int64_t part : {1, 2}) {
          Rope rope;
          rope.style = style;
          rope.scaling = scaling;
          rope.factor = scaling == RopeScaling::none ? 1.0 : 8.0;
          rope.original_max_position = 256;
          rope.rotary_dim = d / part;
          Case c{.name = "rope",
                 .q_heads = 6,
                 .kv_heads = 3,
                 .head_dim = d,
                 .rope = rope,
                 .seed = run_seed() + all.size()};
          c.dtype = kTypes[all.size() / 2 % 2];
          c.q_lengths = {5, 0, 1, 150, 3, 130};
          c.k_lengths = {300, 7, 1, 20, 0, 130};
          c.config = {.block_size = 48, .top_k = 2};
          if (part == 2) c.inputs = {.gap = 8, .swapped = true, .offset = 8}, c.outputs = {.gap = 16, .offset = 24};
          all.push_back(c);
        }
      }
    }
  }
  return all;
}

// Cosines and sines are computed on the device, to the last bit of float64 or two; the rest is exact.
void expect_rotated(const Case& c) {
  SCOPED_TRACE(::testing::Message() << c);
  const Data data(c);
  const auto expected = Runner(c.problem(), reference_options()).rope(data.inputs());
  const auto got = CudaRunner(c.problem()).rope(data.inputs(), c.outputs);
  EXPECT_TRUE(mostly_equal(got.first, expected.first)) << "q";
  EXPECT_TRUE(mostly_equal(got.second, expected.second)) << "k";
  EXPECT_TRUE(got.first.surroundings_untouched() && got.second.surroundings_untouched());
}

TEST_F(CudaRope, Small) {
  const std::vector<Case> all = rope_cases();
  for (std::size_t i = 0; i < all.size(); i += 13) expect_rotated(all[i]);
}

TEST_F(CudaRope, IsTheReferencesButForLastBits) {
  for (const Case& c : rope_cases()) expect_rotated(c);
  Case far{.dtype = DType::bf16, .q_heads = 1, .head_dim = 64, .q_lengths = {40}, .k_lengths = {250'000}};
  far.config = {.block_size = 512, .top_k = 2};
  far.rope = Rope{};
  expect_rotated(far);
}

TEST_F(CudaRope, UsesTheCallersTableAsItIs) {
  for (const Layout& layout : {Layout{}, Layout{.gap = 5, .offset = 1}}) {
    Array cos(DType::f32, {133, 12}, layout), sin(DType::f32, {133, 12}, layout);
    cos.fill(run_seed(), 3.0f);
    sin.fill(run_seed() + 1, 3.0f);
    for (const RopeStyle style : {RopeStyle::half_split, RopeStyle::interleaved}) {
      for (const DType dtype : kTypes) {
        Case c{.dtype = dtype, .head_dim = 64, .q_lengths = {7, 60}, .k_lengths = {130, 60}};
        c.rope = Rope{
            .style = style, .rotary_dim = 24, .cos = std::as_const(cos).tensor(), .sin = std::as_const(sin).tensor()};
        const Data data(c);
        const auto expected = Runner(c.problem(), reference_options()).rope(data.inputs());
        const auto got = CudaRunner(c.problem()).rope(data.inputs());
        EXPECT_TRUE(got.first.bits() == expected.first.bits()) << c;
        EXPECT_TRUE(got.second.bits() == expected.second.bits()) << c;
      }
    }
  }
}

// forward and dense rotate by themselves what rope rotates beforehand.
TEST_F(CudaRope, ForwardRotates) {
  for (const std::int64_t d : {32, 64, 128}) {
    for (const std::int64_t b : {32, 208}) {
      Case c{.dtype = DType::bf16,
             .q_heads = 6,
             .kv_heads = 2,
             .head_dim = d,
             .q_lengths = {90, 500},
             .k_lengths = {600, 500}};
      c.config = {.block_size = b, .top_k = 2};
      c.rope = Rope{.scaling = RopeScaling::llama3, .factor = 8};
      const Data data(c);
      for (const std::string& family : families(c.problem())) {
        CudaRunner run(c.problem(), cuda_options(family));
        const auto rotated = run.rope(data.inputs());
        Inputs inputs = data.inputs();
        inputs.q = rotated.first.tensor();
        inputs.k = rotated.second.tensor();
        Case plain = c;
        plain.rope.reset();
        CudaRunner rest(plain.problem(), cuda_options(family));
        EXPECT_TRUE(run.forward(data.inputs()).bits() == rest.forward(inputs).bits()) << c << ", " << family;
        EXPECT_TRUE(run.dense(data.inputs()).bits() == rest.dense(inputs).bits()) << c << ", " << family;
      }
    }
  }
}

void expect_indexed(const Case& c, const Data& data, Chosen& chosen, const Options& options) {
  Chosen expected = chosen;
  Runner(c.problem(), reference_options()).index(data.inputs(), expected);
  const auto ids = chosen.ids.bits();
  CudaRunner run(c.problem(), options);
  run.index(data.inputs(), chosen);
  EXPECT_TRUE(chosen.ids.bits() == ids) << "ids are an input";
  EXPECT_TRUE(chosen.offsets.bits() == expected.offsets.bits());
  EXPECT_TRUE(chosen.counts.bits() == expected.counts.bits());
  ASSERT_GE(chosen.offsets.as<std::int64_t>(chosen.offsets.dim(0) - 1), 0);
  ASSERT_LE(chosen.offsets.as<std::int64_t>(chosen.offsets.dim(0) - 1), chosen.rows.dim(0));
  EXPECT_TRUE(chosen.transpose() == expected.transpose());
  EXPECT_TRUE(chosen.surroundings_untouched());
}

void expect_indexed(const Case& c) {
  const Data data(c);
  for (const bool shared : {false, true}) {
    SCOPED_TRACE(::testing::Message() << c << (shared ? ", shared" : ""));
    // Room for the smallest slab only: one key head at a time.
    for (const std::size_t limit : {std::size_t{0}, std::size_t{24} << 20}) {
      Chosen chosen(Plan(c.problem(), reference_options()), {.gap = 3, .swapped = shared, .offset = 1}, shared);
      choose_anything(c, chosen, c.seed + 7);
      expect_indexed(c, data, chosen, cuda_options("", limit));
    }
  }
  Chosen chosen = CudaRunner(c.problem()).select(data.inputs());
  expect_indexed(c, data, chosen, cuda_options());
}

TEST_F(CudaIndex, Small) {
  for (const Case& c : small_cases()) expect_indexed(c);
}

TEST_F(CudaIndex, IsTheTranspose) {
  std::vector<Case> all;
  for (const std::int64_t b : {16, 64, 1024}) {
    all.push_back(
        {.q_heads = 6, .kv_heads = 2, .q_lengths = {300}, .k_lengths = {290}, .config = {.block_size = b, .top_k = 4}});
    all.push_back(
        {.q_heads = 3, .kv_heads = 3, .q_lengths = {70}, .k_lengths = {3000}, .config = {.block_size = b, .top_k = 9}});
    all.push_back({.q_heads = 8,
                   .kv_heads = 2,
                   .q_lengths = {0, 1, 300, 9, 0, 500, 64},
                   .k_lengths = {9, 1, 300, 0, 0, 100, 200},
                   .config = {.block_size = b, .top_k = 3}});
    all.push_back({.q_heads = 2, .q_lengths = {20000}, .k_lengths = {100}, .config = {.block_size = b, .top_k = 2}});
    all.push_back({.q_lengths = {0}, .k_lengths = {0}, .config = {.block_size = b, .top_k = 2}});
    all.push_back({.q_lengths = {}, .k_lengths = {}, .config = {.block_size = b, .top_k = 2}});
  }
  all.push_back({.q_heads = 2, .q_lengths = {1500}, .k_lengths = {40000}, .config = {.block_size = 16, .top_k = 64}});
  // More blocks than a window of place_rows, and than count_ids counts at once.
  for (const std::int64_t k : {4, 16}) {
    all.push_back(
        {.q_heads = 2, .q_lengths = {3000}, .k_lengths = {200'000}, .config = {.block_size = 16, .top_k = k}});
  }
  all.push_back(many_sequences());
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].name = "index";
    all[i].dtype = DType::bf16;
    all[i].head_dim = 32;
    all[i].seed = run_seed() + i;
    expect_indexed(all[i]);
  }
}

TEST_F(CudaMerge, SmallFollowsTheSpec) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t d : kHeadDims) {
      for (const int count : {0, 1, 2, 7, 48}) {
        Case c{.dtype = dtype, .q_heads = 6, .kv_heads = 3, .head_dim = d, .q_lengths = {37}, .k_lengths = {70}};
        std::vector<Attention> partials;
        for (int i = 0; i < count; ++i) {
          Attention& partial = partials.emplace_back(
              c.problem(),
              Layout{.gap = std::int64_t{8} * (i % 3), .swapped = i % 2 == 1, .offset = std::int64_t{8} * (i % 4)});
          partial.out.fill(run_seed() + static_cast<std::uint64_t>(i), 1.0f, 0.25f);
          partial.lse.fill(run_seed() + static_cast<std::uint64_t>(i) + 100, i == 3 ? 50.0f : 5.0f);
          for (std::int64_t token = i; token < 37; token += 3) {  // saw no key; what it wrote means nothing
            partial.lse.set(1, token, 0, -kInf);
            partial.out.set(token, 1, 2, kNaN);
          }
        }
        SCOPED_TRACE(::testing::Message() << name(dtype) << ", d " << d << ", " << count << " partials");
        const Attention expected = Runner(c.problem(), reference_options()).merge(partials);
        const Attention got = CudaRunner(c.problem()).merge(partials, {.gap = 8, .offset = 8});
        EXPECT_TRUE(near(got, {expected.out.numbers(), expected.lse.numbers()}, dtype));
        EXPECT_TRUE(got.surroundings_untouched());
        if (count == 1) {
          EXPECT_TRUE(got.out.bits() == expected.out.bits());
        }
      }
    }
  }
}

// The blocks of each row dealt out to two selections: rows with none in one of them are empty there.
TEST_F(CudaMerge, PiecesOfTheSelectionMakeTheWhole) {
  Case c{.dtype = DType::bf16,
         .q_heads = 6,
         .kv_heads = 2,
         .head_dim = 64,
         .q_lengths = {130, 20},
         .k_lengths = {130, 90}};
  c.config = {.block_size = 16, .top_k = 4};
  const Data data(c);
  for (const std::string& family : families(c.problem())) {
    CudaRunner run(c.problem(), cuda_options(family));
    Chosen all = run.select(data.inputs()), odd(run.plan()), even(run.plan());
    for (std::int64_t token = 0; token < 150; ++token) {
      for (std::int64_t head = 0; head < 6; ++head) {
        std::vector<std::int32_t> odds, evens;
        for (const std::int32_t id : all.row(token, head)) (id % 2 ? odds : evens).push_back(id);
        odd.set_row(token, head, odds);
        even.set_row(token, head, evens);
      }
    }
    std::vector<Attention> partials{run.attend(data.inputs(), odd), run.attend(data.inputs(), even)};
    Runner reference(c.problem(), reference_options());
    EXPECT_TRUE(near(run.merge(partials), attend_f64(reference, data.inputs(), all), c.dtype, tolerance(c.dtype)))
        << family;
  }
}

}  // namespace
}  // namespace moba::test
