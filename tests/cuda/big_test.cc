// Tensors of more than 2^31 elements: rows at the edges of 2^31 and 2^32 bytes and elements are compared with float64.
#include <algorithm>
#include <cmath>
#include <limits>

#include "big.h"

namespace moba::test {
namespace {

// docs/spec.md section 4.
std::vector<float> centroid(const Big& b, const Repeated& k, std::int64_t block, std::int64_t head) {
  std::vector<float> mean(kDim);
  const std::int64_t begin = block * b.block_size, end = std::min(begin + b.block_size, b.k_tokens);
  for (std::int64_t x = 0; x < kDim; ++x) {
    float total = 0;
    for (std::int64_t group = begin; group < end; group += 64) {
      float sum = k.get(group, head, x);
      for (std::int64_t j = group + 1; j < std::min(group + 64, end); ++j) sum += k.get(j, head, x);
      total = group == begin ? sum : total + sum;
    }
    mean[x] = bf16_to_float(float_to_bf16(total / static_cast<float>(end - begin)));
  }
  return mean;
}

struct Row {
  std::vector<double> out;
  double lse;
};

// Attention of a row over the keys of `blocks` up to its position.
Row brute_row(const Big& b, const Tensors& t, std::int64_t token, std::int64_t head,
              const std::vector<std::int32_t>& blocks) {
  const std::int64_t position = b.k_tokens - b.q_tokens + token, kv_head = head / (b.q_heads / b.kv_heads);
  std::vector<std::pair<std::int64_t, double>> scores;
  double most = -std::numeric_limits<double>::infinity(), total = 0;
  for (const std::int32_t block : blocks) {
    const std::int64_t begin = std::int64_t{block} * b.block_size;
    for (std::int64_t j = begin; j <= std::min(position, begin + b.block_size - 1); ++j) {
      double score = 0;
      for (std::int64_t x = 0; x < kDim; ++x)
        score += static_cast<double>(t.q.get(token, head, x)) * t.k.get(j, kv_head, x);
      scores.emplace_back(j, score / std::sqrt(static_cast<double>(kDim)));
      most = std::max(most, scores.back().second);
    }
  }
  Row row{std::vector<double>(kDim), 0};
  for (const auto& [j, score] : scores) {
    const double p = std::exp(score - most);
    total += p;
    for (std::int64_t x = 0; x < kDim; ++x) row.out[x] += p * t.v.get(j, kv_head, x);
  }
  for (double& x : row.out) x /= total;
  row.lse = most + std::log(total);
  return row;
}

void expect_row(const Big& b, const Outputs& outputs, std::int64_t token, std::int64_t head, const Row& expected) {
  const auto out = download<std::uint16_t>(outputs.out, (token * b.q_heads + head) * kDim, kDim);
  double error = 0, norm = 0;
  for (std::int64_t x = 0; x < kDim; ++x) {
    const double difference = bf16_to_float(out[x]) - expected.out[x];
    error += difference * difference;
    norm += expected.out[x] * expected.out[x];
  }
  EXPECT_LE(std::sqrt(error / norm), tolerance(DType::bf16)) << "token " << token << ", head " << head;
  const float lse = download<float>(outputs.lse, head * b.q_tokens + token, 1)[0];
  EXPECT_NEAR(lse, expected.lse, 1e-4 * std::max(1.0, std::abs(expected.lse)))
      << "token " << token << ", head " << head;
}

// The choice of a row is the best by float64, but for gaps that float32 cannot tell.
void expect_choice(const Big& b, const Tensors& t, const std::vector<std::vector<float>>& centroids, std::int64_t token,
                   std::int64_t head, const std::vector<std::int32_t>& ids) {
  const std::int64_t own = (b.k_tokens - b.q_tokens + token) / b.block_size, kv_head = head / (b.q_heads / b.kv_heads);
  ASSERT_EQ(std::ssize(ids), std::min(b.top_k, own + 1)) << "token " << token;
  ASSERT_EQ(ids.back(), own) << "token " << token;
  const auto score = [&](std::int64_t block, bool magnitude) {
    double sum = 0;
    for (std::int64_t x = 0; x < kDim; ++x) {
      const double product = static_cast<double>(t.q.get(token, head, x)) * centroids[block * b.kv_heads + kv_head][x];
      sum += magnitude ? std::abs(product) : product;
    }
    return sum;
  };
  double worst = std::numeric_limits<double>::infinity(), size = 0;
  for (const std::int32_t id : ids) {
    if (id != own && score(id, false) < worst) worst = score(id, false), size = score(id, true);
  }
  for (std::int64_t block = 0; block < own; ++block) {
    if (std::ranges::count(ids, block) > 0) continue;
    ASSERT_LE(score(block, false), worst + kDim * 0x1p-24 * (size + score(block, true)))
        << "token " << token << ", head " << head << ", block " << block;
  }
}

void expect_big(const Big& b, bool with_dense) {
  const Tensors t(b);
  const std::vector<std::int64_t> tokens = sampled_tokens(b.q_tokens, b.q_heads);
  const std::vector<std::int64_t> heads{0, b.q_heads / 2, b.q_heads - 1};
  std::vector<std::vector<float>> centroids(static_cast<std::size_t>(b.blocks() * b.kv_heads));
  in_parallel(centroids.size(), [&](std::size_t i) {
    const auto n = static_cast<std::int64_t>(i);
    centroids[i] = centroid(b, t.k, n / b.kv_heads, n % b.kv_heads);
  });
  for (const std::string& family : families(b.problem())) {
    SCOPED_TRACE(family);
    const Plan plan(b.problem(), cuda_options(family));
    std::printf("%s: %s, workspace %zu MiB\n", family.c_str(), plan.kernels().c_str(), plan.workspace_bytes() >> 20);
    const DeviceMemory workspace(plan.workspace_bytes()), selection_memory(plan.selection_bytes());
    const DeviceMemory out(static_cast<std::size_t>(b.q_tokens * b.q_heads * kDim) * 2);
    const DeviceMemory lse(static_cast<std::size_t>(b.q_tokens * b.q_heads) * 4);
    const DeviceMemory pooled(static_cast<std::size_t>(plan.max_blocks() * b.kv_heads * kDim) * 2);
    const int index = device().index;
    const Outputs outputs{Tensor(out.data(), DType::bf16, {b.q_tokens, b.q_heads, kDim}, Device::cuda, index),
                          Tensor(lse.data(), DType::f32, {b.q_heads, b.q_tokens}, Device::cuda, index)};
    const Tensor means(pooled.data(), DType::bf16, {plan.max_blocks(), b.kv_heads, kDim}, Device::cuda, index);
    const Inputs inputs{t.q.tensor(), t.k.tensor(), t.v.tensor(), {}, {}};
    const Selection selection = make_selection(plan, selection_memory.bytes());
    for (const DeviceMemory* m : {&workspace, &selection_memory, &out, &lse, &pooled}) m->poison(test_stream());
    pool(plan, inputs, means, workspace.bytes(), {test_stream()});
    select(plan, inputs, selection, workspace.bytes(), {test_stream()});
    MOBA_CUDA(cudaStreamSynchronize(test_stream()));
    const auto got = download<std::uint16_t>(means, 0, plan.max_blocks() * b.kv_heads * kDim);
    for (std::size_t i = 0; i < got.size(); ++i)
      ASSERT_EQ(bf16_to_float(got[i]), centroids[i / kDim][i % kDim]) << "centroid " << i / kDim;

    std::vector<std::pair<std::int64_t, std::int64_t>> rows;
    for (const std::int64_t token : tokens) {
      for (const std::int64_t head : heads) rows.emplace_back(token, head);
    }
    std::vector<std::vector<std::int32_t>> ids(rows.size());
    std::vector<Row> expected(rows.size()), expected_dense(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ids[i] = download<std::int32_t>(selection.ids, (rows[i].first * b.q_heads + rows[i].second) * plan.slots(),
                                      plan.slots());
      std::erase(ids[i], -1);
      ASSERT_NO_FATAL_FAILURE(expect_choice(b, t, centroids, rows[i].first, rows[i].second, ids[i]));
    }
    std::vector<std::int32_t> every(static_cast<std::size_t>(b.blocks()));
    for (std::size_t i = 0; i < every.size(); ++i) every[i] = static_cast<std::int32_t>(i);
    in_parallel(rows.size(), [&](std::size_t i) {
      expected[i] = brute_row(b, t, rows[i].first, rows[i].second, ids[i]);
      if (with_dense && i < 8) expected_dense[i] = brute_row(b, t, rows[i].first, rows[i].second, every);
    });
    for (const char* function : {"forward", "attend", "dense"}) {
      SCOPED_TRACE(function);
      const bool dense_one = std::string(function) == "dense";
      if (dense_one && !with_dense) continue;
      for (const DeviceMemory* m : {&workspace, &out, &lse}) m->poison(test_stream());
      if (dense_one) {
        dense(plan, inputs, outputs, workspace.bytes(), {test_stream()});
      } else if (std::string(function) == "attend") {
        attend(plan, inputs, selection, outputs, workspace.bytes(), {test_stream()});
      } else {
        forward(plan, inputs, outputs, workspace.bytes(), {test_stream()});
      }
      MOBA_CUDA(cudaStreamSynchronize(test_stream()));
      EXPECT_EQ(count_not_finite(outputs.out), 0);
      for (std::size_t i = 0; i < (dense_one ? std::min<std::size_t>(8, rows.size()) : rows.size()); ++i) {
        expect_row(b, outputs, rows[i].first, rows[i].second, dense_one ? expected_dense[i] : expected[i]);
      }
    }
  }
}

TEST_F(CudaBig, QueriesBeyondTwoToThe31Elements) {
  if (!fits(std::size_t{18} << 30)) GTEST_SKIP() << "needs 18 GiB of free device memory";
  const Big b{
      .q_tokens = 2'100'003, .k_tokens = 2'100'003, .q_heads = 8, .kv_heads = 1, .block_size = 1024, .top_k = 2};
  ASSERT_GT(b.q_tokens * b.q_heads * kDim, std::int64_t{1} << 31);
  expect_big(b, false);
}

TEST_F(CudaBig, KeysBeyondTwoToThe31Elements) {
  if (!fits(std::size_t{16} << 30)) GTEST_SKIP() << "needs 16 GiB of free device memory";
  const Big b{.q_tokens = 70, .k_tokens = 1'050'005, .q_heads = 16, .kv_heads = 16, .block_size = 128, .top_k = 4};
  ASSERT_GT(b.k_tokens * b.kv_heads * kDim, std::int64_t{1} << 31);
  expect_big(b, true);
}

}  // namespace
}  // namespace moba::test
