// pool: centroids are the reference's to the bit, and the mean of the keys.
#include <algorithm>
#include <cmath>

#include "support.h"

namespace moba::test {
namespace {

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t block_size : {1, 7, 63, 64, 65, 128, 1000}) {
      for (const std::int64_t tail : {0, 1, 63}) {
        const std::int64_t length = block_size == 1000 ? 2000 + tail : 3 * block_size + std::min(tail, block_size - 1);
        all.push_back({.name = "tails",
                       .dtype = dtype,
                       .q_heads = 3,
                       .kv_heads = 3,
                       .head_dim = 8 + block_size % 11,
                       .q_lengths = {0},
                       .k_lengths = {length},
                       .config = {.block_size = block_size, .top_k = 1}});
      }
      all.push_back({.name = "strides, packed",
                     .dtype = dtype,
                     .q_heads = 2,
                     .kv_heads = 2,
                     .head_dim = 37,
                     .q_lengths = {0, 1, 0, 2, 0, 0},
                     .k_lengths = {0, 1, block_size, block_size + 1, 0, 130},
                     .config = {.block_size = block_size, .top_k = 1},
                     .inputs = {.gap = 3, .swapped = block_size % 2 == 0, .offset = 5},
                     .outputs = {.gap = 2, .swapped = block_size % 2 == 1, .offset = 7}});
    }
    for (const std::int64_t d : {8, 15, 16, 17, 64, 100, 128, 255, 256}) {
      all.push_back({.name = "dims",
                     .dtype = dtype,
                     .q_heads = 1,
                     .head_dim = d,
                     .q_lengths = {0},
                     .k_lengths = {400},
                     .config = {.block_size = 150, .top_k = 1},
                     .inputs = {.tight = true},
                     .outputs = {.tight = true}});
    }
    all.push_back({.name = "one block of everything",
                   .dtype = dtype,
                   .q_lengths = {3},
                   .k_lengths = {5000},
                   .config = {.block_size = std::int64_t{1} << 40, .top_k = 1}});
  }
  return all;
}

class PoolCases : public ::testing::TestWithParam<Case> {};

TEST_P(PoolCases, CpuEqualsReferenceBitForBit) {
  const Case& c = GetParam();
  const Data data(c);
  const Array expected = Runner(c.problem(), reference_options()).pool(data.inputs());
  for (const Options& options : cpu_kernels(c.dtype)) {
    const Array got = Runner(c.problem(), options).pool(data.inputs(), c.outputs);
    EXPECT_EQ(got.bits(), expected.bits()) << describe(options);
    EXPECT_TRUE(got.surroundings_untouched()) << describe(options);
  }
}

TEST_P(PoolCases, IsTheMeanOfTheKeys) {
  const Case& c = GetParam();
  const Data data(c);
  const Array centroids = Runner(c.problem(), reference_options()).pool(data.inputs());
  const double ulp = c.dtype == DType::f32 ? 1e-6 : c.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  std::int64_t block = 0, first = 0;
  for (const std::int64_t length : c.k_lengths) {
    for (std::int64_t start = 0; start < length; start += std::min(length, c.config.block_size), ++block) {
      const std::int64_t keys = std::min(c.config.block_size, length - start);
      for (std::int64_t head = 0; head < c.kv_heads; ++head) {
        for (std::int64_t x = 0; x < c.head_dim; ++x) {
          double sum = 0, magnitude = 0;
          for (std::int64_t j = 0; j < keys; ++j) {
            const double value = data.k.get(first + start + j, head, x);
            sum += value;
            magnitude += std::abs(value);
          }
          const double mean = sum / static_cast<double>(keys);
          ASSERT_NEAR(centroids.get(block, head, x), mean,
                      ulp * std::abs(mean) + 1e-6 * magnitude / static_cast<double>(keys) + 1e-7)
              << "block " << block << ", head " << head << ", dimension " << x;
        }
      }
    }
    first += length;
  }
  // Rows of blocks that the batch does not have are not written.
  for (; block < centroids.dim(0); ++block) {
    for (std::int64_t x = 0; x < c.head_dim; ++x) ASSERT_TRUE(std::isnan(centroids.get(block, 0, x)));
  }
}

INSTANTIATE_TEST_SUITE_P(Pool, PoolCases, ::testing::ValuesIn(cases()), case_name);

// Sums whose order shows: big and small numbers alternate, so that another grouping gives other bits.
TEST(Pool, KeepsTheOrderOfSummation) {
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {0}, .k_lengths = {200}, .config = {.block_size = 200, .top_k = 1}};
  Data data(c);
  Random random(5);
  for (std::int64_t j = 0; j < 200; ++j) {
    for (std::int64_t x = 0; x < 8; ++x)
      data.k.set(j, 0, x, random.uniform() * std::ldexp(1.0f, static_cast<int>(random.integer(0, 30))));
  }
  std::vector<float> expected;
  for (std::int64_t x = 0; x < 8; ++x) {
    float total = 0;
    for (std::int64_t group = 0; group < 200; group += 64) {
      float sum = data.k.get(group, 0, x);
      for (std::int64_t j = group + 1; j < std::min<std::int64_t>(group + 64, 200); ++j) sum += data.k.get(j, 0, x);
      total = group == 0 ? sum : total + sum;
    }
    expected.push_back(total / 200.0f);
  }
  std::vector<Options> all = cpu_kernels(DType::f32);
  all.push_back(reference_options());
  for (const Options& options : all) {
    const Array centroids = Runner(c.problem(), options).pool(data.inputs());
    for (std::int64_t x = 0; x < 8; ++x) EXPECT_EQ(centroids.get(0, 0, x), expected[x]) << describe(options);
  }
}

TEST(Pool, NonFiniteKeysStayInTheirBlockAndDimension) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    Case c{.dtype = dtype, .q_heads = 1, .head_dim = 20, .q_lengths = {0}, .k_lengths = {60}};
    Data data(c);
    data.k.set(3, 0, 2, NAN);
    data.k.set(20, 0, 19, INFINITY);
    data.k.set(40, 0, 7, INFINITY);
    data.k.set(41, 0, 7, -INFINITY);
    std::vector<Options> all = cpu_kernels(dtype);
    all.push_back(reference_options());
    for (const Options& options : all) {
      SCOPED_TRACE(describe(options));
      const Array centroids = Runner(c.problem(), options).pool(data.inputs());
      for (std::int64_t b = 0; b < 4; ++b) {
        for (std::int64_t x = 0; x < 20; ++x) {
          const float is = centroids.get(b, 0, x);
          if ((b == 0 && x == 2) || (b == 2 && x == 7)) {
            EXPECT_TRUE(std::isnan(is)) << b << " " << x;
          } else if (b == 1 && x == 19) {
            EXPECT_EQ(is, INFINITY);
          } else {
            EXPECT_TRUE(std::isfinite(is)) << b << " " << x;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
