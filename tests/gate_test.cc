// gate: which blocks the cpu chooses, against the reference. Where scores are exact (small whole numbers) or tie
// because centroids are equal the ids must be the same; elsewhere a difference must be explained by rounding.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "support.h"

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

void expect_same(const Case& c, const Scores& scores, const Layout& layout = {}) {
  SCOPED_TRACE(::testing::Message() << c);
  const Inputs inputs = scores.data.inputs();
  const Chosen expected = Runner(c.problem(), reference_options()).gate(inputs, scores.centroids);
  ASSERT_TRUE(well_formed(c, expected));
  for (const Options& options : cpu_kernels(c.dtype)) {
    SCOPED_TRACE(describe(options));
    const Chosen got = Runner(c.problem(), options).gate(inputs, scores.centroids, layout);
    ASSERT_EQ(got.ids.bits(), expected.ids.bits());
    ASSERT_EQ(got.counts.bits(), expected.counts.bits());
    ASSERT_TRUE(got.surroundings_untouched());
  }
}

void expect_explained(const Case& c, const Scores& scores) {
  SCOPED_TRACE(::testing::Message() << c);
  const Inputs inputs = scores.data.inputs();
  const Chosen expected = Runner(c.problem(), reference_options()).gate(inputs, scores.centroids);
  for (const Options& options : cpu_kernels(c.dtype)) {
    const Chosen got = Runner(c.problem(), options).gate(inputs, scores.centroids);
    ASSERT_TRUE(explained(c, inputs, scores.centroids, expected, got)) << describe(options);
  }
}

// The rule of docs/spec.md section 5 once more: sort all candidates, take the best.
std::vector<std::int32_t> by_hand(const std::vector<double>& score, std::int64_t position, const Config& config) {
  const std::int64_t own = position / config.block_size, n = config.causal ? own : std::ssize(score);
  if (config.causal && position < 0) return {};
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](std::int32_t a, std::int32_t b) {
    const bool a_nan = std::isnan(score[a]), b_nan = std::isnan(score[b]);
    return a_nan != b_nan ? b_nan : (!a_nan && score[a] != score[b]) ? score[a] > score[b] : a > b;
  });
  const std::int64_t free = config.top_k - (config.causal ? 1 : 0);
  if (std::ssize(order) > free) order.resize(static_cast<std::size_t>(free));
  if (config.causal) order.push_back(static_cast<std::int32_t>(own));
  std::ranges::sort(order);
  return order;
}

TEST(Gate, ReferenceFollowsTheSpec) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t k : {1, 2, 3, 5, 100}) {
      Case c{.q_heads = 1,
             .head_dim = 8,
             .q_lengths = {44},
             .k_lengths = {40},
             .config = {.block_size = 4, .top_k = k, .causal = causal}};
      Scores scores(c);
      scores.make_exact(static_cast<std::uint64_t>(k), 1);
      scores.centroids.set(2, 0, 0, kNaN);
      scores.centroids.set(5, 0, 1, kNaN);
      scores.centroids.set(6, 0, 1, -kInf);
      const Chosen got = Runner(c.problem(), reference_options()).gate(scores.data.inputs(), scores.centroids);
      for (std::int64_t token = 0; token < 44; ++token) {
        std::vector<double> score(10);
        for (std::int64_t b = 0; b < 10; ++b) {
          for (std::int64_t x = 0; x < 8; ++x)
            score[b] += static_cast<double>(scores.data.q.get(token, 0, x)) * scores.centroids.get(b, 0, x);
        }
        ASSERT_EQ(got.row(token, 0), by_hand(score, token - 4, c.config)) << c << ", token " << token;
      }
    }
  }
}

// k = 1, few, one less than there are blocks, as many, more; beyond 16 (the lanes of a vector) and beyond 256 (a tile).
TEST(Gate, ExactScoresGiveTheReferencesIds) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t blocks : {1, 2, 17, 70, 600}) {
      for (const std::int64_t k : {std::int64_t{1}, std::int64_t{2}, std::int64_t{8}, std::int64_t{17},
                                   std::int64_t{33}, std::int64_t{300}, blocks - 1, blocks, blocks + 5}) {
        if (k < 1 || (k > 8 && k < blocks - 1 && blocks == 70)) continue;
        Case c{.q_heads = 3, .head_dim = 8, .config = {.block_size = 2, .top_k = k, .causal = causal}};
        c.k_lengths = {2 * blocks - 1};
        c.q_lengths = {std::min<std::int64_t>(c.k_lengths[0], blocks > 100 ? 40 : 150)};
        Scores scores(c);
        scores.make_exact(static_cast<std::uint64_t>(blocks + k));
        expect_same(c, scores);
      }
    }
  }
}

TEST(Gate, EveryRatioOfHeads) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const auto& [q_heads, kv_heads] : {std::pair{2, 2}, {3, 1}, {9, 3}, {8, 2}, {9, 1}, {71, 1}, {2100, 1}}) {
      Case c{.dtype = dtype, .q_heads = q_heads, .kv_heads = kv_heads, .head_dim = 19};
      c.q_lengths = c.k_lengths = {q_heads > 100 ? 9 : 90};
      c.config = {.block_size = q_heads > 100 ? 1 : 7, .top_k = 4};
      c.inputs = {.gap = 3, .swapped = q_heads % 2 == 1, .offset = 1};
      Scores scores(c);
      scores.make_exact(static_cast<std::uint64_t>(q_heads));
      expect_same(c, scores, {.gap = 2, .swapped = q_heads % 2 == 0, .offset = 3});
    }
  }
}

TEST(Gate, PackedAndUnequalLengths) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t k : {1, 3, 6}) {
      Case c{.q_heads = 4, .kv_heads = 2, .head_dim = 16, .config = {.block_size = 8, .top_k = k, .causal = causal}};
      c.q_lengths = {0, 1, 50, 7, 200, 90, 1, 3, 0, 33};
      c.k_lengths = {0, 1, 50, 90, 100, 90, 300, 0, 12, 32};
      Scores scores(c);
      scores.make_exact(static_cast<std::uint64_t>(k));
      expect_same(c, scores);
      expect_explained(c, Scores(c));
    }
  }
}

TEST(Gate, EqualCentroidsAreTakenFromTheMostRecent) {
  for (const bool causal : {true, false}) {
    for (const std::int64_t k : {1, 2, 5, 16, 17, 40, 299}) {
      for (const std::int64_t patterns : {1, 2, 3, 7, 150}) {
        Case c{.q_heads = 2,
               .head_dim = 24,
               .q_lengths = {60},
               .k_lengths = {700},
               .config = {.block_size = 1, .top_k = k, .causal = causal}};
        Scores scores(c);  // of no special values: ties come from equal centroids alone
        for (std::int64_t b = patterns; b < 700; ++b) {
          for (std::int64_t x = 0; x < 24; ++x) scores.centroids.set(b, 0, x, scores.centroids.get(b % patterns, 0, x));
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

TEST(Gate, ZerosOfBothSignsTie) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c{.dtype = dtype,
           .q_heads = 2,
           .head_dim = 9,
           .q_lengths = {50},
           .k_lengths = {400},
           .config = {.block_size = 1, .top_k = 5}};
    Scores scores(c);
    scores.make_exact(3, 1);
    for (std::int64_t b = 0; b < 400; ++b) {
      for (std::int64_t x = 0; x < 9; ++x) {
        if (b % 3 != 1) scores.centroids.set(b, 0, x, b % 2 == 0 ? 0.0f : -0.0f);
      }
    }
    expect_same(c, scores);
    scores.data.q.fill_value(-0.0f);
    expect_same(c, scores);
  }
}

// Products that underflow leave zeros of both signs, and zeros tie.
TEST(Gate, UnderflowTies) {
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {50}, .k_lengths = {400}, .config = {.block_size = 1, .top_k = 5}};
  Scores scores(c);
  scores.data.q.fill_value(1e-30f);
  for (std::int64_t b = 0; b < 400; ++b) {
    for (std::int64_t x = 0; x < 8; ++x) scores.centroids.set(b, 0, x, b % 3 == 0 ? 1e-30f : -1e-30f);
  }
  for (const Options& options : cpu_kernels(DType::f32)) {
    const Chosen got = Runner(c.problem(), options).gate(scores.data.inputs(), scores.centroids);
    for (std::int32_t token = 0; token < 50; ++token) {
      const std::int32_t own = 350 + token;
      ASSERT_EQ(got.row(token, 0), (std::vector<std::int32_t>{own - 4, own - 3, own - 2, own - 1, own}))
          << describe(options);
    }
  }
}

// Scores that are single elements of the centroids, so exact, and equal or a last bit apart.
TEST(Gate, TellsOneBitApart) {
  for (const std::int64_t k : {1, 2, 5, 17, 100}) {
    Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {60}, .k_lengths = {700}, .config = {.block_size = 1, .top_k = k}};
    Scores scores(c);
    Random random(static_cast<std::uint64_t>(k));
    scores.data.q.fill_value(0.0f);
    for (std::int64_t token = 0; token < 60; ++token)
      scores.data.q.set(token, 0, token % 8, token % 16 < 8 ? 1.0f : -2.0f);
    for (std::int64_t b = 0; b < 700; ++b) {
      for (std::int64_t x = 0; x < 8; ++x)
        scores.centroids.set(b, 0, x, 1.0f + 0x1p-23f * static_cast<float>(random.integer(0, 9)));
    }
    expect_same(c, scores);
  }
}

TEST(Gate, NanIsLastAndInfinityIsANumber) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const bool causal : {true, false}) {
      for (const std::int64_t k : {1, 2, 4, 20, 100, 690}) {
        Case c{.dtype = dtype,
               .q_heads = 2,
               .head_dim = 12,
               .q_lengths = {40},
               .k_lengths = {700},
               .config = {.block_size = 1, .top_k = k, .causal = causal}};
        Scores scores(c);
        scores.make_exact(9, 1);
        Random random(static_cast<std::uint64_t>(k));
        for (std::int64_t b = 0; b < 700; ++b) {
          if (random.one_in(3)) scores.centroids.set(b, 0, random.integer(0, 11), kNaN);
          if (random.one_in(5)) scores.centroids.set(b, 0, random.integer(0, 11), random.one_in(2) ? kInf : -kInf);
        }
        for (std::int64_t token = 0; token < 40; token += 4)
          scores.data.q.set(token, 1, token / 4, token % 8 == 0 ? kNaN : -kInf);
        expect_same(c, scores);
        scores.centroids.fill_value(kNaN);
        expect_same(c, scores);
        scores.centroids.fill_value(-kInf);
        expect_same(c, scores);
      }
    }
  }
}

TEST(Gate, DifferencesAreExplainedByRounding) {
  Random random(11);
  for (int i = 0; i < (kSanitized ? 10 : 50); ++i) {
    Case c{.dtype = std::array{DType::f32, DType::f16, DType::bf16}[random.integer(0, 2)]};
    c.kv_heads = random.integer(1, 3);
    c.q_heads = c.kv_heads * random.integer(1, 4);
    c.head_dim = random.integer(8, 256);
    c.config = {.block_size = random.integer(1, 3), .top_k = random.integer(1, 40), .causal = !random.one_in(3)};
    c.k_lengths = {random.integer(1, 1000)};
    c.q_lengths = {random.integer(1, 60)};
    c.q_amplitude = std::ldexp(1.0f, static_cast<int>(random.integer(-6, 6)));
    c.seed = static_cast<std::uint64_t>(i);
    expect_explained(c, Scores(c));
  }
}

// Centroids a last bit apart: float32 cannot tell all of them, but may not choose what is clearly worse.
TEST(Gate, NearTiesAreExplainedByRounding) {
  for (const std::int64_t d : {8, 64, 200}) {
    Case c{.q_heads = 4,
           .kv_heads = 2,
           .head_dim = d,
           .q_lengths = {100},
           .k_lengths = {300},
           .config = {.block_size = 1, .top_k = 9}};
    Scores scores(c);
    Random random(4);
    for (std::int64_t b = 1; b < 300; ++b) {
      for (std::int64_t h = 0; h < 2; ++h) {
        for (std::int64_t x = 0; x < d; ++x) {
          const float base = scores.centroids.get(0, h, x);
          scores.centroids.set(b, h, x, random.one_in(4) ? std::nextafter(base, 2.0f) : base);
        }
      }
    }
    expect_explained(c, scores);
  }
}

// The whole way: keys, centroids, ids. Equal keys and keys of whole numbers leave nothing to rounding.
TEST(Gate, SelectFromKeys) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t block_size : {1, 16, 100}) {
      Case c{
          .dtype = dtype, .q_heads = 6, .kv_heads = 2, .head_dim = 16, .q_lengths = {300, 65}, .k_lengths = {333, 65}};
      c.config = {.block_size = block_size, .top_k = 3};
      for (const int keys : {0, 1, 2, 3}) {
        Data data(c);
        if (keys == 0) data.k.fill_value(0.3f);  // all keys equal: all scores tie
        if (keys == 1) data.k.fill_value(0.0f);
        if (keys == 2) data.k.fill_integers(5, 3), data.q.fill_integers(6, 3);
        SCOPED_TRACE(::testing::Message() << c << ", keys " << keys);
        Runner reference(c.problem(), reference_options());
        Chosen expected = reference.select(data.inputs());
        const Array centroids = reference.pool(data.inputs());
        // Sums of up to 16 whole numbers over 16 are exact in every type; other means are rounded before they are used.
        const bool exact = keys < 2 || (keys == 2 && block_size < 100);
        for (const Options& options : cpu_kernels(dtype)) {
          Chosen got = Runner(c.problem(), options).select(data.inputs(), {.gap = 1});
          ASSERT_TRUE(explained(c, data.inputs(), centroids, expected, got)) << describe(options);
          if (!exact) continue;
          ASSERT_EQ(got.ids.bits(), expected.ids.bits()) << describe(options);
          ASSERT_EQ(got.offsets.bits(), expected.offsets.bits()) << describe(options);
          ASSERT_EQ(got.transpose(), expected.transpose()) << describe(options);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
