// append and decode: prompts fed whole, in chunks and token by token, in every form of the cache, against one prefill.
#include <algorithm>
#include <cmath>

#include "cache_support.h"

namespace moba::test {
namespace {

// The largest relative difference of a row of out.
double off(const Array& a, const Array& b) {
  double worst = 0;
  for (std::int64_t token = 0; token < a.dim(0); ++token) {
    for (std::int64_t head = 0; head < a.dim(1); ++head) {
      double difference = 0, norm = 0;
      for (std::int64_t d = 0; d < a.dim(2); ++d) {
        difference += std::pow(double{a.get(token, head, d)} - b.get(token, head, d), 2);
        norm += std::pow(double{b.get(token, head, d)}, 2);
      }
      if (!(difference <= 1e30)) return 1e30;  // NaN too
      worst = std::max(worst, std::sqrt(difference / std::max(norm, 1e-30)));
    }
  }
  return worst;
}

double lse_off(const Array& a, const Array& b) {
  double worst = 0;
  for (std::int64_t head = 0; head < a.dim(0); ++head) {
    for (std::int64_t token = 0; token < a.dim(1); ++token) {
      const double x = a.get(head, token), y = b.get(head, token);
      if (x != y) worst = std::max(worst, std::isfinite(x) ? std::fabs(x - y) : 1e30);
    }
  }
  return worst;
}

// One prefill of the prompts.
struct Prefill {
  Chosen chosen;
  Attention result;
  Array centroids;

  Prefill(const Case& c, const Data& data, const Options& options) : Prefill(Runner(c.problem(), options), c, data) {}

 private:
  Prefill(Runner run, const Case& c, const Data& data)
      : chosen(run.plan()), result(c.problem()), centroids(c.dtype, {run.plan().max_blocks(), c.kv_heads, c.head_dim}) {
    Inputs inputs = data.inputs();
    std::pair<Array, Array> rotated;
    result = run.forward(inputs);
    if (c.rope) {
      rotated = run.rope(inputs);
      inputs.q = rotated.first.tensor();
      inputs.k = rotated.second.tensor();
    }
    centroids = run.pool(inputs);
    chosen = run.select(inputs);
  }
};

// What a cache gives must be the prefill's: the ids exactly, out and lse within bounds.
void expect_prefill(const Case& c, const Prefill& prefill, const Fed& fed, double bound) {
  EXPECT_EQ(fed.ids.bits(), prefill.chosen.ids.bits()) << c;
  EXPECT_LE(off(fed.out, prefill.result.out), bound) << c;
  EXPECT_LE(lse_off(fed.lse, prefill.result.lse), 4e-6) << c;
}

Case ragged(std::int64_t block_size, std::int64_t group, DType dtype = DType::f32) {
  Case c{.name = "ragged",
         .dtype = dtype,
         .q_heads = 2 * group,
         .kv_heads = 2,
         .head_dim = 32,
         .q_lengths = {3 * block_size + 5, 0, 1, block_size, 5 * block_size - 1},
         .config = {.block_size = block_size, .top_k = 3}};
  c.k_lengths = c.q_lengths;
  return c;
}

double bound_of(DType dtype) { return dtype == DType::f32 ? 1e-6 : dtype == DType::f16 ? 1e-3 : 8e-3; }

Options threads_of(int threads) {
  Options options;
  options.threads = threads;
  return options;
}

TEST(Cache, WholeChunksAndTokensGiveThePrefill) {
  for (const std::int64_t block_size : {16, 64, 128}) {
    for (const std::int64_t group : {1, 4}) {
      if (kSanitized && block_size * group > 64) continue;
      const Case c = ragged(block_size, group);
      const Data data(c);
      const Prefill prefill(c, data, threads_of(2));
      for (const Steps& steps : {whole(c.k_lengths), by_tokens(c.k_lengths), by_tokens(c.k_lengths, block_size),
                                 by_random_chunks(c.k_lengths, 2 * block_size, 3)}) {
        SCOPED_TRACE(steps.size());
        expect_prefill(c, prefill, feed(c, data, steps, {}, threads_of(2)), 1e-6);
      }
    }
  }
}

TEST(Cache, PagesGiveThePrefill) {
  for (const CacheForm form : {CacheForm::block_table, CacheForm::csr}) {
    for (const std::int64_t page_size : {16, 64, 128, 256, 7}) {
      for (const std::int64_t block_size : {64, 128}) {
        for (const std::int64_t group : {1, 4}) {
          if (kSanitized && block_size * group > 128) continue;
          const Case c = ragged(block_size, group);
          const Data data(c);
          const Prefill prefill(c, data, threads_of(2));
          for (const Steps& steps : {whole(c.k_lengths), by_random_chunks(c.k_lengths, 150, page_size)}) {
            SCOPED_TRACE(std::to_string(page_size) + ", steps " + std::to_string(steps.size()));
            const CacheCase how{form, page_size, form == CacheForm::csr};
            expect_prefill(c, prefill, feed(c, data, steps, how, threads_of(2)), 1e-6);
          }
        }
      }
    }
  }
}

TEST(Cache, PagesGiveTheBitsOfTheContiguousCache) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Case c = ragged(64, 4, dtype);
    const Data data(c);
    const Steps steps = by_random_chunks(c.k_lengths, 100, 5);
    const Fed contiguous = feed(c, data, steps, {}, threads_of(2));
    for (const CacheForm form : {CacheForm::block_table, CacheForm::csr}) {
      const Fed paged = feed(c, data, steps, {form, 16}, threads_of(2));
      EXPECT_EQ(paged.out.bits(), contiguous.out.bits());
      EXPECT_EQ(paged.lse.bits(), contiguous.lse.bits());
      EXPECT_EQ(paged.ids.bits(), contiguous.ids.bits());
    }
  }
}

TEST(Cache, EveryKernelGivesItsPrefill) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t d : {8, 20, 128}) {
      Case c = ragged(32, 3, dtype);
      c.head_dim = d;
      c.outputs = {.gap = 3, .offset = 1};
      const Data data(c);
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(describe(options) + ", d " + std::to_string(d));
        const Prefill prefill(c, data, options);
        const double bound = options.bf16_products == Bf16Products::dot ? 2e-2 : bound_of(dtype);
        const Fed fed = feed(c, data, by_random_chunks(c.k_lengths, 40, 9), {CacheForm::block_table, 8}, options);
        EXPECT_EQ(fed.ids.bits(), prefill.chosen.ids.bits());
        EXPECT_LE(off(fed.out, prefill.result.out), bound);
      }
    }
  }
}

TEST(Cache, CentroidsAreThoseOfPool) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c = ragged(80, 1, dtype);
    c.rope = Rope{};
    const Data data(c);
    const Prefill prefill(c, data, threads_of(2));
    for (const Options& options : {threads_of(2), reference_options()}) {
      for (const Steps& steps : {whole(c.k_lengths), by_tokens(c.k_lengths), by_random_chunks(c.k_lengths, 200, 1)}) {
        CacheMemory memory(c, {CacheForm::block_table, 16});
        feed(c, data, steps, {}, options, &memory);
        std::int64_t row = 0;
        for (std::size_t s = 0; s < c.k_lengths.size(); ++s) {
          for (std::int64_t b = 0; b < c.k_lengths[s] / 80; ++b) {
            for (std::int64_t h = 0; h < 2; ++h) {
              std::vector<std::uint32_t> expected;
              for (std::int64_t d = 0; d < c.head_dim; ++d) {
                expected.push_back(std::bit_cast<std::uint32_t>(prefill.centroids.get(row + b, h, d)));
              }
              EXPECT_EQ(memory.centroid(static_cast<std::int64_t>(s), b, h), expected);
            }
          }
          row += (c.k_lengths[s] + 79) / 80;
        }
      }
    }
  }
}

TEST(Cache, RotatesByTheAbsolutePosition) {
  for (const RopeStyle style : {RopeStyle::half_split, RopeStyle::interleaved}) {
    Case c = ragged(64, 4);
    c.rope = Rope{.style = style, .rotary_dim = 24};
    const Data data(c);
    const Prefill prefill(c, data, threads_of(2));
    for (const Steps& steps : {whole(c.k_lengths), by_tokens(c.k_lengths), by_random_chunks(c.k_lengths, 90, 2)}) {
      expect_prefill(c, prefill, feed(c, data, steps, {CacheForm::csr, 32}, threads_of(2)), 1e-6);
    }
  }
}

TEST(Cache, ThreadsGiveTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Case c = ragged(48, 4, dtype);
    const Data data(c);
    for (const Steps& steps : {by_tokens(c.k_lengths), by_random_chunks(c.k_lengths, 200, 8)}) {
      const Fed one = feed(c, data, steps, {CacheForm::block_table, 16}, threads_of(1));
      for (const int threads : {2, 3, 7}) {
        const Fed more = feed(c, data, steps, {CacheForm::block_table, 16}, threads_of(threads));
        EXPECT_EQ(more.out.bits(), one.out.bits());
        EXPECT_EQ(more.lse.bits(), one.lse.bits());
        EXPECT_EQ(more.ids.bits(), one.ids.bits());
      }
    }
  }
}

TEST(Cache, TheReferenceAgrees) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c = ragged(16, 4, dtype);
    c.rope = Rope{};
    const Data data(c);
    const Steps steps = by_random_chunks(c.k_lengths, 30, 4);
    const Fed reference = feed(c, data, steps, {CacheForm::csr, 8}, reference_options());
    const Fed cpu = feed(c, data, steps, {CacheForm::csr, 8}, threads_of(2));
    EXPECT_EQ(cpu.ids.bits(), reference.ids.bits());
    EXPECT_LE(off(cpu.out, reference.out), tolerance(dtype));
    EXPECT_LE(lse_off(cpu.lse, reference.lse), 1e-5);
    const Prefill prefill(c, data, reference_options());
    EXPECT_EQ(reference.out.bits(), prefill.result.out.bits());
    EXPECT_EQ(reference.ids.bits(), prefill.chosen.ids.bits());
  }
}

// Blocks longer than one task, blocks of one key, more slots than blocks, k = 1, a group above the rows of a tile.
TEST(Cache, OddShapes) {
  std::vector<Case> cases;
  cases.push_back({.name = "long blocks",
                   .q_heads = 2,
                   .head_dim = 16,
                   .q_lengths = {2600},
                   .config = {.block_size = 2500, .top_k = 2}});
  cases.push_back({.name = "one block",
                   .q_heads = 2,
                   .head_dim = 16,
                   .q_lengths = {1100},
                   .config = {.block_size = 1 << 30, .top_k = 2}});
  cases.push_back({.name = "blocks of one",
                   .q_heads = 2,
                   .head_dim = 16,
                   .q_lengths = {300},
                   .config = {.block_size = 1, .top_k = 5}});
  cases.push_back({.name = "all blocks",
                   .q_heads = 2,
                   .head_dim = 16,
                   .q_lengths = {300},
                   .config = {.block_size = 16, .top_k = 1000}});
  cases.push_back(
      {.name = "own only", .q_heads = 2, .head_dim = 16, .q_lengths = {200}, .config = {.block_size = 16, .top_k = 1}});
  cases.push_back(
      {.name = "many heads", .q_heads = 75, .head_dim = 8, .q_lengths = {70}, .config = {.block_size = 8, .top_k = 3}});
  cases.push_back({.name = "many blocks",
                   .q_heads = 2,
                   .head_dim = 8,
                   .q_lengths = {1500},
                   .config = {.block_size = 2, .top_k = 20}});
  cases.push_back({.name = "scale",
                   .q_heads = 2,
                   .head_dim = 8,
                   .q_lengths = {90},
                   .config = {.block_size = 8, .top_k = 3, .scale = -0.5}});
  for (Case& c : cases) {
    if (kSanitized && c.total_q() > 500) continue;
    c.k_lengths = c.q_lengths;
    SCOPED_TRACE(c.name);
    const Data data(c);
    const Prefill prefill(c, data, threads_of(2));
    for (const Steps& steps : {by_tokens(c.k_lengths), by_random_chunks(c.k_lengths, 60, 6)}) {
      const Fed fed = feed(c, data, steps, {CacheForm::block_table, 24}, threads_of(2));
      EXPECT_EQ(fed.ids.bits(), prefill.chosen.ids.bits());
      EXPECT_LE(off(fed.out, prefill.result.out), 2e-6);  // sums of up to 2500 keys
    }
  }
}

TEST(Cache, NoSequencesAndNoTokens) {
  Case c = ragged(16, 1);
  c.q_lengths = c.k_lengths = {0, 0};
  const Data data(c);
  feed(c, data, {{0, 0}}, {}, threads_of(1));
  c.q_lengths = c.k_lengths = {};
  feed(c, data, {{}}, {}, threads_of(1));
  feed(c, data, {{}}, {CacheForm::csr, 16}, reference_options());
}

// More rows than are split at a time.
TEST(Cache, ManySequences) {
  Case c{.q_heads = 4, .kv_heads = 2, .head_dim = 8, .config = {.block_size = 4, .top_k = 3}};
  c.q_lengths.clear();
  for (std::int64_t s = 0; s < 300; ++s) c.q_lengths.push_back(s % 23);
  c.k_lengths = c.q_lengths;
  const Data data(c);
  const Prefill prefill(c, data, threads_of(2));
  for (const CacheForm form : {CacheForm::contiguous, CacheForm::csr}) {
    const Fed fed = feed(c, data, by_tokens(c.k_lengths, 7), {form, 8}, threads_of(2));
    expect_prefill(c, prefill, fed, 1e-6);
  }
}

// NaN goes where it goes in the reference, whichever way a sequence is computed.
TEST(Cache, NaN) {
  Case c = ragged(16, 4);
  Data data(c);
  for (std::int64_t d = 0; d < 32; ++d) data.k.set(25, 0, d, std::nanf(""));
  data.v.set(40, 1, 3, std::nanf(""));
  data.q.set(60, 5, 0, std::nanf(""));
  for (const Steps& steps : {by_tokens(c.k_lengths), whole(c.k_lengths), by_random_chunks(c.k_lengths, 25, 7)}) {
    const Fed expected = feed(c, data, steps, {CacheForm::csr, 8}, reference_options());
    const Fed got = feed(c, data, steps, {CacheForm::csr, 8}, threads_of(2));
    EXPECT_EQ(got.ids.bits(), expected.ids.bits());
    const std::vector<double> a = got.out.numbers(), b = expected.out.numbers();
    std::int64_t different = 0;
    for (std::size_t i = 0; i < a.size(); ++i) different += std::isnan(a[i]) != std::isnan(b[i]) ? 1 : 0;
    EXPECT_EQ(different, 0);
  }
}

// A key that no row chose, or that lies behind the query, leaves no trace.
TEST(Cache, ReadsOnlyTheChosenBlocks) {
  Case c{.q_heads = 2,
         .kv_heads = 1,
         .head_dim = 16,
         .q_lengths = {100},
         .k_lengths = {100},
         .config = {.block_size = 10, .top_k = 1}};
  const Data data(c);
  const Fed good = feed(c, data, by_tokens(c.k_lengths), {}, threads_of(2));
  Data spoilt(c);
  for (std::int64_t j = 0; j < 90; ++j) spoilt.v.set(j, 0, 3, std::nanf(""));
  const Fed fed = feed(c, spoilt, by_tokens(c.k_lengths), {}, threads_of(2));
  for (std::int64_t token = 90; token < 100; ++token) {
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(fed.out.get(token, 1, d), good.out.get(token, 1, d));
  }
  EXPECT_TRUE(std::isnan(fed.out.get(89, 1, 3)));
}

// Tokens that are taken back, as speculative decoding does: lengths go down, and others are appended in their place.
TEST(Cache, TokensCanBeTakenBack) {
  Case c{.q_heads = 4, .kv_heads = 2, .head_dim = 32, .q_lengths = {150}, .config = {.block_size = 16, .top_k = 3}};
  c.k_lengths = c.q_lengths;
  const Data data(c);
  Data other(c);
  constexpr std::int64_t kKept = 37;  // within a block, behind ones that are full
  for (Array* x : {&other.q, &other.k, &other.v}) x->fill(99);
  const Options options{.threads = 2};
  const Prefill prefill(c, data, options);
  for (const CacheForm form : {CacheForm::contiguous, CacheForm::block_table}) {
    CacheMemory memory(c, {.form = form});
    feed(c, data, {{kKept}}, {.form = form}, options, &memory);
    feed(c, other, {{60}, {150 - kKept - 60}}, {.form = form}, options, &memory);
    memory.advance({kKept - 150});
    const Fed fed = feed(c, data, {{1}, {150 - kKept - 1}}, {.form = form}, options, &memory);
    for (std::int64_t token = kKept; token < 150; ++token) {
      for (std::int64_t head = 0; head < 4; ++head) {
        for (std::int64_t slot = 0; slot < 3; ++slot) {
          ASSERT_EQ(fed.ids.as<std::int32_t>(token, head, slot), prefill.chosen.ids.as<std::int32_t>(token, head, slot))
              << "token " << token;
        }
        for (std::int64_t d = 0; d < 32; ++d) {
          ASSERT_NEAR(fed.out.get(token, head, d), prefill.result.out.get(token, head, d), 1e-5) << "token " << token;
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
