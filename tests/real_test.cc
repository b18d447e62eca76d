// Every step of the cpu against the reference on Q, K and V of a real language model (data/README.md).
#include <filesystem>

#include "safetensors.h"
#include "support.h"

namespace moba::test {
namespace {

// The last `queries` tokens of the text as queries, all of it as keys.
struct Text {
  Case c{.dtype = DType::bf16, .q_heads = 9, .kv_heads = 3, .head_dim = 64, .rope = Rope{.base = 100000.0}};
  Array q, k, v;

  explicit Text(std::int64_t queries, const Config& config) {
    const cli::SafetensorsReader reader(MOBA_DATA_DIR "/smollm2-135m-layer15.safetensors");
    const auto read = [&](const char* name, std::int64_t tokens, std::int64_t heads) {
      const cli::FileTensor& file = *reader.find(name);
      EXPECT_EQ(file.shape, (std::vector<std::int64_t>{4096, heads, 64}));
      Array array(DType::bf16, {tokens, heads, 64});
      const cli::Buffer bytes = reader.read(file);
      const std::size_t size = static_cast<std::size_t>(tokens * heads * 64) * 2;
      std::memcpy(array.tensor().data, bytes.data() + bytes.size() - size, size);
      return array;
    };
    q = read("q", queries, 9);
    k = read("k", 4096, 3);
    v = read("v", 4096, 3);
    c.q_lengths = {queries};
    c.k_lengths = {4096};
    c.config = config;
  }
  Inputs inputs() const { return {q.tensor(), k.tensor(), v.tensor(), {}, {}}; }
  // Without rope, for the stages after it.
  Problem rotated_problem() const {
    Problem p = c.problem();
    p.rope.reset();
    return p;
  }
};

constexpr std::int64_t kQueries = kSanitized ? 48 : 512;

TEST(RealInput, RopePoolGateAndIndex) {
  for (const Config& config : {Config{.block_size = 128, .top_k = 8}, Config{.block_size = 50, .top_k = 3}}) {
    const Text text(kSanitized ? 256 : 4096, config);
    Runner reference(text.c.problem(), reference_options());
    auto rotated = reference.rope(text.inputs());
    Inputs inputs = text.inputs();
    inputs.q = std::as_const(rotated.first).tensor();
    inputs.k = std::as_const(rotated.second).tensor();
    const Array centroids = reference.pool(inputs);
    const Chosen expected = reference.gate(inputs, centroids);
    for (const Options& options : cpu_kernels(DType::bf16)) {
      SCOPED_TRACE(describe(options) + ", block size " + std::to_string(config.block_size));
      Runner run(text.c.problem(), options);
      const auto got = run.rope(text.inputs());
      EXPECT_TRUE(got.first.bits() == rotated.first.bits());
      EXPECT_TRUE(got.second.bits() == rotated.second.bits());
      EXPECT_TRUE(run.pool(inputs).bits() == centroids.bits());
      Chosen chosen = run.gate(inputs, centroids);
      EXPECT_TRUE(explained(text.c, inputs, centroids, expected, chosen));
      Chosen transposed(run.plan());
      transposed.ids = chosen.ids;
      run.index(inputs, chosen);
      reference.index(inputs, transposed);
      EXPECT_TRUE(chosen.offsets.bits() == transposed.offsets.bits());
      EXPECT_TRUE(chosen.transpose() == transposed.transpose());
    }
  }
}

TEST(RealInput, ForwardAndAttend) {
  for (const Config& config : {Config{.block_size = 128, .top_k = 8}, Config{.block_size = 50, .top_k = 3}}) {
    const Text text(kQueries, config);
    Runner reference(text.c.problem(), reference_options());
    auto rotated = reference.rope(text.inputs());
    Inputs inputs = text.inputs();
    inputs.q = std::as_const(rotated.first).tensor();
    inputs.k = std::as_const(rotated.second).tensor();
    std::vector<std::uint64_t> ids;
    reference::Rows expected;
    for (const Options& options : cpu_kernels(DType::bf16)) {
      SCOPED_TRACE(describe(options) + ", block size " + std::to_string(config.block_size));
      Runner run(text.rotated_problem(), options);
      Chosen chosen = run.select(inputs);
      if (ids != chosen.ids.bits()) {  // the first, or a choice that differs by rounding
        ids = chosen.ids.bits();
        expected = attend_f64(run, inputs, chosen);
      }
      const Attention got = run.attend(inputs, chosen);
      EXPECT_TRUE(close(got, expected, DType::bf16));
      EXPECT_TRUE(run.forward(inputs).bits() == got.bits());
      EXPECT_TRUE(Runner(text.c.problem(), options).forward(text.inputs()).bits() == got.bits());
    }
  }
}

TEST(RealInput, Dense) {
  const Text text(kSanitized ? 16 : 128, {.block_size = 128, .top_k = 8});
  Runner reference(text.c.problem(), reference_options());
  auto rotated = reference.rope(text.inputs());
  Inputs inputs = text.inputs();
  inputs.q = std::as_const(rotated.first).tensor();
  inputs.k = std::as_const(rotated.second).tensor();
  const reference::Rows expected = dense_f64(reference, inputs);
  for (const Options& options : cpu_kernels(DType::bf16)) {
    EXPECT_TRUE(close(Runner(text.c.problem(), options).dense(text.inputs()), expected, DType::bf16))
        << describe(options);
  }
}

// The text in float32 (every bfloat16 is one) and in float16, where other kernels and tighter bounds apply.
TEST(RealInput, OtherTypes) {
  Text text(kSanitized ? 24 : 128, {.block_size = 64, .top_k = 6});
  for (const DType dtype : {DType::f32, DType::f16}) {
    const auto convert = [&](const Array& x) {
      Array y(dtype, {x.dim(0), x.dim(1), x.dim(2)});
      for (std::int64_t i = 0; i < x.dim(0); ++i) {
        for (std::int64_t j = 0; j < x.dim(1); ++j) {
          for (std::int64_t l = 0; l < x.dim(2); ++l) y.set(i, j, l, x.get(i, j, l));
        }
      }
      return y;
    };
    const Array q = convert(text.q), k = convert(text.k), v = convert(text.v);
    Case c = text.c;
    c.dtype = dtype;
    const Inputs inputs{q.tensor(), k.tensor(), v.tensor(), {}, {}};
    Runner reference(c.problem(), reference_options());
    const auto rotated = reference.rope(inputs);
    const Inputs after{rotated.first.tensor(), rotated.second.tensor(), v.tensor(), {}, {}};
    const Array centroids = reference.pool(after);
    const Chosen expected = reference.gate(after, centroids);
    for (const Options& options : cpu_kernels(dtype)) {
      SCOPED_TRACE(std::string(name(dtype)) + ", " + describe(options));
      Runner run(c.problem(), options);
      Chosen chosen = run.select(after);
      EXPECT_TRUE(explained(c, after, centroids, expected, chosen));
      EXPECT_TRUE(close(run.forward(inputs), attend_f64(run, after, chosen), dtype));
    }
  }
}

}  // namespace
}  // namespace moba::test
