// gate of both kernel families against the reference. Where scores are exact (small whole numbers) or tie because
// centroids are equal the ids must be the same; elsewhere a difference must be explained by float32 rounding.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cases.h"
#include "cuda_test.h"

namespace moba::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Queries of a case, and centroids: one for each of its blocks and key heads.
struct Scores {
  Data data;
  Array centroids;

  explicit Scores(const Case& c)
      : data(c), centroids(c.dtype, {Plan(c.problem()).max_blocks(), c.kv_heads, c.head_dim}, c.inputs) {
    centroids.fill(c.seed + 77);
  }
  void make_exact(std::uint64_t seed, std::int64_t most = 2) {
    data.q.fill_integers(seed, most);
    centroids.fill_integers(seed + 1, most);
  }
};

Chosen reference_choice(const Case& c, const Scores& scores) {
  return Runner(c.problem(), reference_options()).gate(scores.data.inputs(), scores.centroids);
}

void expect_same(const Case& c, const Scores& scores, const Layout& layout = {}) {
  const Chosen expected = reference_choice(c, scores);
  for (const std::string& family : families(c.problem())) {
    SCOPED_TRACE(::testing::Message() << c << ", " << family);
    const Chosen got =
        CudaRunner(c.problem(), cuda_options(family)).gate(scores.data.inputs(), scores.centroids, layout);
    EXPECT_TRUE(well_formed(c, got));
    ASSERT_TRUE(got.ids.bits() == expected.ids.bits());
    EXPECT_TRUE(got.counts.bits() == expected.counts.bits());
    EXPECT_TRUE(got.surroundings_untouched());
  }
}

void expect_explained(const Case& c, const Scores& scores) {
  const Chosen expected = reference_choice(c, scores);
  for (const std::string& family : families(c.problem())) {
    SCOPED_TRACE(::testing::Message() << c << ", " << family);
    const Chosen got = CudaRunner(c.problem(), cuda_options(family)).gate(scores.data.inputs(), scores.centroids);
    ASSERT_TRUE(explained_picks(c, scores.data.inputs(), scores.centroids, expected, got));
  }
}

class CudaGate : public CudaTest {};

TEST_F(CudaGate, Small) {
  for (const Case& c : small_cases()) {
    Scores scores(c);
    expect_explained(c, scores);
    scores.make_exact(c.seed);
    expect_same(c, scores, {.gap = 1, .offset = 3});
  }
}

// k = 1, few, around what a lane and a list hold, one less than there are blocks, as many, more; few blocks and many.
TEST_F(CudaGate, ExactScoresGiveTheReferencesIds) {
  std::uint64_t seed = run_seed();
  for (const bool causal : {true, false}) {
    for (const std::int64_t blocks : {1, 2, 17, 63, 64, 65, 200, 1200}) {
      for (const std::int64_t k :
           {std::int64_t{1}, std::int64_t{2}, std::int64_t{8}, std::int64_t{12}, std::int64_t{16}, std::int64_t{17},
            std::int64_t{18}, std::int64_t{40}, std::int64_t{64}, blocks - 1, blocks}) {
        if (k < 1 || k > 64) continue;
        Case c{.name = "exact", .dtype = kTypes[++seed % 2], .q_heads = 3, .head_dim = seed % 3 == 0 ? 128 : 64};
        c.config = {.block_size = 16, .top_k = k, .causal = causal};
        c.k_lengths = {16 * blocks - 1};
        c.q_lengths = {std::min<std::int64_t>(c.k_lengths[0], blocks > 100 ? 60 : 300)};
        Scores scores(c);
        scores.make_exact(seed);
        expect_same(c, scores);
      }
    }
  }
}

TEST_F(CudaGate, EveryDimAndRatioOfHeads) {
  std::uint64_t seed = run_seed();
  for (const std::int64_t d : kHeadDims) {
    for (const auto& [q_heads, kv_heads] : {std::pair{2, 2}, {3, 1}, {9, 3}, {8, 2}, {8, 1}, {64, 1}, {100, 1}}) {
      Case c{.name = "heads", .dtype = kTypes[++seed % 2], .q_heads = q_heads, .kv_heads = kv_heads, .head_dim = d};
      c.q_lengths = c.k_lengths = {q_heads > 10 ? 150 : 400};
      c.config = {.block_size = 16, .top_k = 4};
      c.inputs = {.gap = 24, .swapped = q_heads % 2 == 1, .offset = 8};
      Scores scores(c);
      scores.make_exact(seed);
      expect_same(c, scores, {.gap = 2, .swapped = q_heads % 2 == 0, .offset = 3});
    }
  }
}

TEST_F(CudaGate, PackedAndUnequalLengths) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t k : {1, 3, 6, 30}) {
      for (const std::int64_t d : {64, 128, 32}) {
        Case c{.name = "packed", .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
        c.config = {.block_size = 16, .top_k = k, .causal = causal};
        c.q_lengths = {0, 1, 50, 7, 200, 90, 1, 3, 0, 133};
        c.k_lengths = {0, 1, 50, 190, 100, 90, 900, 0, 12, 232};
        Scores scores(c);
        expect_explained(c, scores);
        scores.make_exact(static_cast<std::uint64_t>(k));
        expect_same(c, scores);
      }
    }
  }
}

TEST_F(CudaGate, EqualCentroidsAreTakenFromTheMostRecent) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t k : {1, 2, 5, 16, 17, 40, 64}) {
      for (const std::int64_t patterns : {1, 2, 3, 7, 150}) {
        Case c{
            .name = "ties", .dtype = DType::bf16, .q_heads = 2, .head_dim = 64, .q_lengths = {100}, .seed = run_seed()};
        c.k_lengths = {11200};
        c.config = {.block_size = 16, .top_k = k, .causal = causal};
        Scores scores(c);  // of no special values: ties come from equal centroids alone
        for (std::int64_t b = patterns; b < 700; ++b) {
          for (std::int64_t x = 0; x < 64; ++x) scores.centroids.set(b, 0, x, scores.centroids.get(b % patterns, 0, x));
        }
        SCOPED_TRACE(::testing::Message() << patterns << " patterns");
        if (patterns < 10) {
          expect_same(c, scores);
        } else {
          expect_explained(c, scores);
        }
      }
    }
  }
}

TEST_F(CudaGate, ZerosOfBothSignsTie) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t d : {64, 128}) {
      Case c{.name = "zeros", .dtype = dtype, .q_heads = 2, .head_dim = d, .q_lengths = {50}, .k_lengths = {6400}};
      c.config = {.block_size = 16, .top_k = 5};
      Scores scores(c);
      scores.make_exact(3, 1);
      for (std::int64_t b = 0; b < 400; ++b) {
        for (std::int64_t x = 0; x < d; ++x) {
          if (b % 3 != 1) scores.centroids.set(b, 0, x, b % 2 == 0 ? 0.0f : -0.0f);
        }
      }
      expect_same(c, scores);
      scores.data.q.fill_value(-0.0f);
      expect_same(c, scores);
    }
  }
}

// Scores that are single elements of the centroids, so exact, and equal or a last bit apart.
TEST_F(CudaGate, TellsOneBitApart) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t k : {1, 2, 5, 17, 64}) {
      Case c{.name = "one bit", .dtype = dtype, .q_heads = 1, .head_dim = 64, .q_lengths = {120}, .k_lengths = {11200}};
      c.config = {.block_size = 16, .top_k = k};
      Scores scores(c);
      Random random(run_seed());
      scores.data.q.fill_value(0.0f);
      for (std::int64_t token = 0; token < 120; ++token) {
        scores.data.q.set(token, 0, token % 64, token % 16 < 8 ? 1.0f : -2.0f);
      }
      const float step = dtype == DType::bf16 ? 0x1p-7f : 0x1p-10f;
      for (std::int64_t b = 0; b < 700; ++b) {
        for (std::int64_t x = 0; x < 64; ++x)
          scores.centroids.set(b, 0, x, 1.0f + step * static_cast<float>(random.integer(0, 60)));
      }
      expect_same(c, scores);
    }
  }
}

TEST_F(CudaGate, NanIsLastAndInfinityIsANumber) {
  for (const DType dtype : kTypes) {
    for (const bool causal : {true, false}) {
      for (const std::int64_t k : {1, 2, 4, 12, 20, 64}) {
        for (const std::int64_t d : {64, 96}) {
          Case c{.name = "nan", .dtype = dtype, .q_heads = 2, .head_dim = d, .q_lengths = {40}, .k_lengths = {4800}};
          c.config = {.block_size = 16, .top_k = k, .causal = causal};
          Scores scores(c);
          scores.make_exact(9, 1);
          Random random(run_seed() + static_cast<std::uint64_t>(k));
          for (std::int64_t b = 0; b < 300; ++b) {
            if (random.one_in(3)) scores.centroids.set(b, 0, random.integer(0, d - 1), kNaN);
            if (random.one_in(5)) scores.centroids.set(b, 0, random.integer(0, d - 1), random.one_in(2) ? kInf : -kInf);
          }
          for (std::int64_t token = 0; token < 40; token += 4)
            scores.data.q.set(token, 1, token / 4, token % 8 == 0 ? kNaN : -kInf);
          expect_same(c, scores);
          for (const float value : {kNaN, -kInf}) {
            scores.centroids.fill_value(value);
            expect_same(c, scores);
          }
        }
      }
    }
  }
}

TEST_F(CudaGate, DifferencesAreExplainedByRounding) {
  for (int i = 0; i < random_cases(80); ++i) {
    Random random(run_seed() * 1000 + static_cast<std::uint64_t>(i));
    Case c{.name = "random", .dtype = kTypes[random.integer(0, 1)]};
    c.kv_heads = random.integer(1, 3);
    c.q_heads = c.kv_heads * random.integer(1, 8);
    c.head_dim = random.one_in(2) ? 64 : random.one_in(2) ? 128 : kHeadDims[random.integer(0, 5)];
    c.config = {.block_size = 16, .top_k = random.integer(1, random.one_in(3) ? 64 : 17), .causal = !random.one_in(3)};
    c.k_lengths = {random.integer(1, 11200)};
    c.q_lengths = {random.integer(1, 100)};
    c.q_amplitude = std::ldexp(1.0f, static_cast<int>(random.integer(-6, 6)));
    c.seed = random.bits() % 1000000;
    expect_explained(c, Scores(c));
  }
}

// Centroids a last bit apart: float32 cannot tell all of them, but may not choose what is clearly worse.
TEST_F(CudaGate, NearTiesAreExplainedByRounding) {
  for (const std::int64_t d : {32, 64, 128, 256}) {
    Case c{.name = "near ties", .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
    c.q_lengths = {100};
    c.k_lengths = {4800};
    c.config = {.block_size = 16, .top_k = 9};
    Scores scores(c);
    Random random(run_seed());
    for (std::int64_t b = 1; b < 300; ++b) {
      for (std::int64_t h = 0; h < 2; ++h) {
        for (std::int64_t x = 0; x < d; ++x) {
          const float base = scores.centroids.get(0, h, x);
          scores.centroids.set(b, h, x, random.one_in(4) ? base * (1.0f + 0x1p-7f) : base);
        }
      }
    }
    expect_explained(c, scores);
  }
}

// The whole way: keys, centroids, ids. Equal keys and keys of whole numbers leave nothing to rounding.
TEST_F(CudaGate, SelectFromKeys) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t block_size : {16, 112}) {
      for (const int keys : {0, 1, 2, 3}) {
        Case c{.name = "keys", .dtype = dtype, .q_heads = 6, .kv_heads = 2, .head_dim = 64, .q_lengths = {300, 65}};
        c.k_lengths = {733, 65};
        c.config = {.block_size = block_size, .top_k = 3};
        Data data(c);
        if (keys == 0) data.k.fill_value(0.3f);  // all keys equal: all scores tie
        if (keys == 1) data.k.fill_value(0.0f);
        if (keys == 2) data.k.fill_integers(5, 3), data.q.fill_integers(6, 3);
        Runner reference(c.problem(), reference_options());
        const Chosen expected = reference.select(data.inputs());
        const Array centroids = reference.pool(data.inputs());
        const bool exact = keys < 2 || (keys == 2 && block_size == 16);
        for (const std::string& family : families(c.problem())) {
          SCOPED_TRACE(::testing::Message() << c << ", keys " << keys << ", " << family);
          Chosen got = CudaRunner(c.problem(), cuda_options(family)).select(data.inputs(), {.gap = 1});
          ASSERT_TRUE(explained_picks(c, data.inputs(), centroids, expected, got));
          if (!exact) continue;
          ASSERT_TRUE(got.ids.bits() == expected.ids.bits());
          ASSERT_TRUE(got.offsets.bits() == expected.offsets.bits());
          ASSERT_TRUE(got.transpose() == expected.transpose());
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
