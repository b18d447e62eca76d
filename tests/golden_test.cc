// The files of golden/: every step of both backends gives what is in them, as golden/README.md says to compare.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "safetensors.h"
#include "support.h"

namespace moba::test {
namespace {

std::vector<std::string> files() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(MOBA_GOLDEN_DIR)) {
    if (entry.path().extension() == ".safetensors") names.push_back(entry.path().stem());
  }
  std::ranges::sort(names);
  return names;
}

DType dtype_of(const std::string& name) {
  return name == "F32"    ? DType::f32
         : name == "F16"  ? DType::f16
         : name == "BF16" ? DType::bf16
         : name == "I32"  ? DType::i32
                          : DType::i64;
}

class Golden : public ::testing::TestWithParam<std::string> {
 protected:
  Golden() : reader_(std::string(MOBA_GOLDEN_DIR) + "/" + GetParam() + ".safetensors") {}

  bool has(const std::string& name) const { return reader_.find(name) != nullptr; }
  Array tensor(const std::string& name) const {
    const cli::FileTensor& file = *reader_.find(name);
    Array array(dtype_of(file.dtype), file.shape);
    const cli::Buffer bytes = reader_.read(file);
    std::memcpy(array.tensor().data, bytes.data(), bytes.size());
    return array;
  }
  std::string text(const std::string& key) const {
    const auto found = reader_.metadata().find(key);
    return found == reader_.metadata().end() ? "" : found->second;
  }
  double number(const std::string& key, double otherwise = 0) const {
    return text(key).empty() ? otherwise : std::stod(text(key));
  }

  Problem problem(const Array& q, const Array& k, const Array& cu_q, const Array& cu_k) const {
    Problem p{
        .dtype = q.dtype(), .q_heads = q.dim(1), .kv_heads = k.dim(1), .head_dim = q.dim(2), .batch = cu_q.dim(0) - 1};
    p.total_q = q.dim(0);
    p.total_k = k.dim(0);
    for (std::int64_t s = 0; s < p.batch; ++s) {
      p.max_seqlen_q = std::max<std::int64_t>(p.max_seqlen_q, cu_q.as<std::int32_t>(s + 1) - cu_q.as<std::int32_t>(s));
      p.max_seqlen_k = std::max<std::int64_t>(p.max_seqlen_k, cu_k.as<std::int32_t>(s + 1) - cu_k.as<std::int32_t>(s));
    }
    p.config = {.block_size = std::stoll(text("block_size")),
                .top_k = std::stoll(text("top_k")),
                .causal = text("causal") == "true",
                .scale = number("scale")};
    if (text("rope_style").empty()) return p;
    Rope rope;
    rope.style = text("rope_style") == "half-split" ? RopeStyle::half_split : RopeStyle::interleaved;
    rope.rotary_dim = std::stoll(text("rope_rotary_dim"));
    rope.base = number("rope_base");
    rope.scaling = text("rope_scaling") == "yarn" ? RopeScaling::yarn : RopeScaling::llama3;
    rope.factor = number("rope_factor");
    rope.original_max_position = number("rope_original_max_position");
    rope.low_freq_factor = number("rope_low_freq_factor", rope.low_freq_factor);
    rope.high_freq_factor = number("rope_high_freq_factor", rope.high_freq_factor);
    rope.beta_fast = number("rope_beta_fast", rope.beta_fast);
    rope.beta_slow = number("rope_beta_slow", rope.beta_slow);
    if (rope.scaling == RopeScaling::yarn) rope.attention_factor = number("rope_attention_factor");
    p.rope = rope;
    return p;
  }

  // Each stage from the expected result of the stage before it, then all of them in one call.
  void expect_everything(const Options& options) const {
    SCOPED_TRACE(describe(options));
    const Array q = tensor("q"), k = tensor("k"), v = tensor("v"), cu_q = tensor("cu_seqlens_q"),
                cu_k = tensor("cu_seqlens_k");
    const Problem p = problem(q, k, cu_q, cu_k);
    const Array out = tensor("out"), lse = tensor("lse"), ids = tensor("ids"), counts = tensor("counts"),
                centroids = tensor("centroids");
    const reference::Rows expected{out.numbers(), lse.numbers()};
    Inputs inputs{q.tensor(), k.tensor(), v.tensor(), cu_q.tensor(), cu_k.tensor()};
    Runner run(p, options);
    EXPECT_TRUE(close(run.forward(inputs), expected, p.dtype));

    Array q_rotated, k_rotated;
    if (p.rope) {
      const auto rotated = run.rope(inputs);
      q_rotated = tensor("q_rotated");
      k_rotated = tensor("k_rotated");
      EXPECT_EQ(rotated.first.bits(), q_rotated.bits());
      EXPECT_EQ(rotated.second.bits(), k_rotated.bits());
      inputs.q = std::as_const(q_rotated).tensor();
      inputs.k = std::as_const(k_rotated).tensor();
    }
    const std::int64_t blocks = centroids.dim(0);
    Array all_centroids(p.dtype, {run.plan().max_blocks(), p.kv_heads, p.head_dim});
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (std::int64_t h = 0; h < p.kv_heads; ++h) {
        for (std::int64_t x = 0; x < p.head_dim; ++x) all_centroids.set(b, h, x, centroids.get(b, h, x));
      }
    }
    EXPECT_EQ(run.pool(inputs).bits(), all_centroids.bits());
    const Chosen gated = run.gate(inputs, all_centroids);
    EXPECT_EQ(gated.ids.bits(), ids.bits());
    EXPECT_EQ(gated.counts.bits(), counts.bits());

    Chosen indexed(run.plan());
    indexed.ids = ids;
    run.index(inputs, indexed);
    EXPECT_EQ(indexed.counts.bits(), counts.bits());
    const Array offsets = tensor("offsets"), rows = tensor("rows");
    for (std::int64_t h = 0; h < p.kv_heads; ++h) {
      for (std::int64_t b = 0; b <= blocks; ++b) {
        ASSERT_EQ(indexed.offsets.as<std::int64_t>(h * run.plan().max_blocks() + b),
                  offsets.as<std::int64_t>(h * blocks + b));
      }
    }
    const std::vector<std::int32_t> transpose = indexed.transpose();
    EXPECT_TRUE(std::ranges::equal(transpose, rows.bits(), {},
                                   [](std::int32_t row) { return static_cast<std::uint64_t>(row); }));
    EXPECT_TRUE(close(run.attend(inputs, indexed), expected, p.dtype));
  }

 private:
  cli::SafetensorsReader reader_;
};

TEST_P(Golden, Reference) { expect_everything(reference_options()); }

TEST_P(Golden, Cpu) {
  for (const Options& options : cpu_kernels(tensor("q").dtype())) expect_everything(options);
}

TEST_P(Golden, InputsAreWhatTheReadmeSays) {
  const Array q = tensor("q"), k = tensor("k"), v = tensor("v"), cu_k = tensor("cu_seqlens_k");
  const auto seed = static_cast<std::uint32_t>(number("seed"));
  const std::int64_t patterns = static_cast<std::int64_t>(number("key_patterns")),
                     b = static_cast<std::int64_t>(number("block_size"));
  const auto noise = [](std::uint32_t s, std::uint32_t i) {
    std::uint32_t h = i + 0x9e3779b9u * s;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    h = h ^ (h >> 16);
    return static_cast<float>(h >> 8) / 8388608.0f - 1.0f;
  };
  EXPECT_EQ(noise(1, 0) * 8388608.0f, 1231407.0f);
  EXPECT_EQ(noise(1, 3) * 8388608.0f, 7176670.0f);
  const auto expect = [&](const Array& x, std::uint32_t s, float amplitude, bool repeats) {
    Array one(x.dtype(), {1, 1, 1});
    for (std::int64_t i = 0; i < x.dim(0); ++i) {
      const std::int64_t source = repeats ? i / b % patterns * b + i % b : i;
      for (std::int64_t j = 0; j < x.dim(1) * x.dim(2); ++j) {
        one.set(0, 0, 0, amplitude * noise(s, static_cast<std::uint32_t>(source * x.dim(1) * x.dim(2) + j)));
        ASSERT_EQ(x.get(i, j / x.dim(2), j % x.dim(2)), one.get(0));
      }
    }
  };
  expect(q, seed, 4.0f, false);
  expect(k, seed + 1, 1.0f, patterns > 0);
  expect(v, seed + 2, 1.0f, false);
}

INSTANTIATE_TEST_SUITE_P(Files, Golden, ::testing::ValuesIn(files()), [](const auto& file) { return file.param; });

TEST(GoldenFiles, AreThere) { EXPECT_GE(files().size(), 10u); }

}  // namespace
}  // namespace moba::test
