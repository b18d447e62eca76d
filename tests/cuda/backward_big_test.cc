// Gradients of more than 2^31 elements: all are written; rows of dq and keys of dk and dv at the edges of 2^31 and 2^32
// bytes and elements are compared with float64. Those of a training size: the same bits run after run.
#include <algorithm>
#include <cmath>
#include <functional>

#include "big.h"
#include "cuda_input.h"

namespace moba::test {
namespace {

using Vector = std::vector<double>;

// A problem and what its passes read; the patterns repeat after so many tokens of q, dout and k.
struct Sources {
  Big b;
  Tensors t;
  Repeated dout;

  Sources(const Big& big, std::int64_t q_period, std::int64_t dout_period, std::int64_t k_period)
      : b(big), t(b, q_period, k_period), dout(b.q_tokens, b.q_heads, dout_period, run_seed() + 3, 0) {}
};

// All that forward and backward of a kernel family write.
struct Training {
  const Big& b;
  const Tensors& t;
  const Repeated& dout_memory;
  Plan plan;
  DeviceMemory workspace, ids, out, lse, dq, dk, dv;
  Inputs inputs;
  Selection selection;
  Outputs outputs;
  Gradients gradients;

  Training(const Sources& sources, const std::string& family)
      : b(sources.b),
        t(sources.t),
        dout_memory(sources.dout),
        plan(b.problem(), cuda_options(family)),
        workspace(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes())),
        ids(static_cast<std::size_t>(b.q_tokens * b.q_heads * plan.slots()) * 4),
        out(q_bytes()),
        lse(static_cast<std::size_t>(b.q_tokens * b.q_heads) * 4),
        dq(q_bytes()),
        dk(k_bytes()),
        dv(k_bytes()),
        inputs{t.q.tensor(), t.k.tensor(), t.v.tensor(), {}, {}} {
    const int index = device().index;
    const auto rows = [&](const DeviceMemory& memory, std::int64_t tokens, std::int64_t heads) {
      return Tensor(memory.data(), DType::bf16, {tokens, heads, kDim}, Device::cuda, index);
    };
    selection.ids = Tensor(ids.data(), DType::i32, {b.q_tokens, b.q_heads, plan.slots()}, Device::cuda, index);
    outputs.out = rows(out, b.q_tokens, b.q_heads);
    outputs.lse = Tensor(lse.data(), DType::f32, {b.q_heads, b.q_tokens}, Device::cuda, index);
    gradients = {rows(dq, b.q_tokens, b.q_heads), rows(dk, b.k_tokens, b.kv_heads), rows(dv, b.k_tokens, b.kv_heads)};
  }
  std::size_t q_bytes() const { return static_cast<std::size_t>(b.q_tokens * b.q_heads * kDim) * 2; }
  std::size_t k_bytes() const { return static_cast<std::size_t>(b.k_tokens * b.kv_heads * kDim) * 2; }

  // Over the choice of forward, or over all keys.
  void run(bool dense_one) const {
    for (const DeviceMemory* m : {&workspace, &ids, &out, &lse, &dq, &dk, &dv}) m->poison(test_stream());
    const ConstOutputs results{outputs.out, outputs.lse};
    const ConstTensor dout = dout_memory.tensor();
    if (dense_one) {
      dense(plan, inputs, outputs, workspace.bytes(), {test_stream()});
      workspace.poison(test_stream());
      dense_backward(plan, inputs, results, dout, gradients, workspace.bytes(), {test_stream()});
    } else {
      forward(plan, inputs, selection, outputs, workspace.bytes(), {test_stream()});
      workspace.poison(test_stream());
      backward(plan, inputs, selection, results, dout, gradients, workspace.bytes(), {test_stream()});
    }
    MOBA_CUDA(cudaStreamSynchronize(test_stream()));
  }
};

double dot(const std::uint16_t* a, const std::uint16_t* b) {
  double sum = 0;
  for (std::int64_t x = 0; x < kDim; ++x) sum += static_cast<double>(bf16_to_float(a[x])) * bf16_to_float(b[x]);
  return sum;
}

// A row of the problem, with what forward wrote for it.
struct Row {
  std::int64_t token, head;
  double lse, delta;
};

// What the host reads of a run: the choice and lse of all rows, out of those that are asked for.
class Seen {
 public:
  Seen(const Training& training, bool dense_one)
      : t_(training),
        dense_(dense_one),
        lse_(download<float>(t_.outputs.lse, 0, t_.b.q_heads * t_.b.q_tokens)),
        ids_(dense_ ? std::vector<std::int32_t>()
                    : download<std::int32_t>(t_.selection.ids, 0, t_.b.q_tokens * t_.b.q_heads * t_.plan.slots())) {}

  bool chose(std::int64_t token, std::int64_t head, std::int64_t block) const {
    if (dense_) return true;
    const std::int32_t* const row = &ids_[static_cast<std::size_t>((token * t_.b.q_heads + head) * t_.plan.slots())];
    return std::find(row, row + t_.plan.slots(), block) != row + t_.plan.slots();
  }
  std::int64_t first_id(std::int64_t token, std::int64_t head) const {
    return dense_ ? 0 : ids_[static_cast<std::size_t>((token * t_.b.q_heads + head) * t_.plan.slots())];
  }
  Row row(std::int64_t token, std::int64_t head) const {
    const auto out = download<std::uint16_t>(t_.outputs.out, (token * t_.b.q_heads + head) * kDim, kDim);
    return {token, head, lse_[static_cast<std::size_t>(head * t_.b.q_tokens + token)],
            dot(t_.dout_memory.row(token, head), out.data())};
  }

 private:
  const Training& t_;
  bool dense_;
  std::vector<float> lse_;
  std::vector<std::int32_t> ids_;
};

// P and dx of a row and a key (docs/spec.md section 11).
struct Pair {
  double weight, slope;
};
Pair pair_of(const Training& t, const Row& row, std::int64_t key) {
  const std::int64_t kv_head = row.head / (t.b.q_heads / t.b.kv_heads);
  const double score = dot(t.t.q.row(row.token, row.head), t.t.k.row(key, kv_head));
  const double product = dot(t.dout_memory.row(row.token, row.head), t.t.v.row(key, kv_head));
  const double weight = std::exp(score / std::sqrt(static_cast<double>(kDim)) - row.lse);
  return {weight, weight * (product - row.delta)};
}

Vector expected_dq(const Training& t, const Seen& seen, const Row& row) {
  const std::int64_t position = t.b.k_tokens - t.b.q_tokens + row.token;
  const std::int64_t kv_head = row.head / (t.b.q_heads / t.b.kv_heads);
  Vector dq(kDim);
  for (std::int64_t block = 0; block * t.b.block_size <= position; ++block) {
    if (!seen.chose(row.token, row.head, block)) continue;
    const std::int64_t end = std::min(position + 1, (block + 1) * t.b.block_size);
    for (std::int64_t key = block * t.b.block_size; key < end; ++key) {
      const double slope = pair_of(t, row, key).slope / std::sqrt(static_cast<double>(kDim));
      for (std::int64_t x = 0; x < kDim; ++x) dq[x] += slope * t.t.k.get(key, kv_head, x);
    }
  }
  return dq;
}

// The rows that attend to a key.
std::vector<Row> rows_of(const Training& t, const Seen& seen, std::int64_t key, std::int64_t kv_head) {
  const std::int64_t group = t.b.q_heads / t.b.kv_heads;
  std::vector<Row> rows;
  const std::int64_t first = std::max<std::int64_t>(0, key - (t.b.k_tokens - t.b.q_tokens));
  for (std::int64_t token = first; token < t.b.q_tokens; ++token) {
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      if (seen.chose(token, head, key / t.b.block_size)) rows.push_back(seen.row(token, head));
    }
  }
  return rows;
}

struct KeySlopes {
  Vector dk = Vector(kDim), dv = Vector(kDim);
};
KeySlopes expected_key(const Training& t, const std::vector<Row>& rows, std::int64_t key) {
  KeySlopes slopes;
  for (const Row& row : rows) {
    const auto [weight, slope] = pair_of(t, row, key);
    for (std::int64_t x = 0; x < kDim; ++x) {
      slopes.dk[x] += slope * t.t.q.get(row.token, row.head, x) / std::sqrt(static_cast<double>(kDim));
      slopes.dv[x] += weight * t.dout_memory.get(row.token, row.head, x);
    }
  }
  return slopes;
}

double norm(const Vector& x) {
  double sum = 0;
  for (const double one : x) sum += one * one;
  return std::sqrt(sum);
}

using Places = std::vector<std::pair<std::int64_t, std::int64_t>>;  // token and head

// The bound of docs/spec.md section 11, for an average row of those given: terms that cancel, as in a row with one key,
// leave the rounding of what they were. Zeros where `empty` says so.
void expect_rows(const char* name, const Tensor& gradient, const Places& places, const std::vector<Vector>& expected,
                 const std::function<bool(std::size_t)>& empty) {
  double squares = 0;
  for (const Vector& row : expected) squares += norm(row) * norm(row);
  const double average = std::sqrt(squares / static_cast<double>(expected.size()));
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto [token, head] = places[i];
    const auto got = download<std::uint16_t>(gradient, (token * gradient.shape[1] + head) * kDim, kDim);
    Vector error = expected[i];
    for (std::int64_t x = 0; x < kDim; ++x) error[x] -= bf16_to_float(got[x]);
    const double size = norm(expected[i]), allowed = empty(i) ? 0 : std::max(size, average);
    EXPECT_LE(norm(error), gradient_bound(DType::bf16) * allowed)
        << name << ", token " << token << ", head " << head << ", norm " << size << ", average " << average;
  }
}

void expect_gradients(const Training& t, bool dense_one) {
  SCOPED_TRACE(dense_one ? "dense_backward" : "backward");
  t.run(dense_one);
  const Seen seen(t, dense_one);
  for (const Tensor* x : {&t.gradients.dq, &t.gradients.dk, &t.gradients.dv}) EXPECT_EQ(count_not_finite(*x), 0);

  Places rows, keys;
  for (const std::int64_t token : sampled_tokens(t.b.q_tokens, t.b.q_heads)) {
    for (const std::int64_t head : {std::int64_t{0}, t.b.q_heads - 1}) rows.emplace_back(token, head);
  }
  for (const std::int64_t token : sampled_tokens(t.b.k_tokens, t.b.kv_heads)) {
    for (const std::int64_t head : {std::int64_t{0}, t.b.kv_heads - 1}) keys.emplace_back(token, head);
  }
  for (const auto& [token, head] : rows) {  // keys that somebody chose; their rows cost the host time
    if (head == 0) continue;
    keys.emplace_back(seen.first_id(token, head) * t.b.block_size, head / (t.b.q_heads / t.b.kv_heads));
  }
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());

  std::vector<Row> values;
  for (const auto& [token, head] : rows) values.push_back(seen.row(token, head));
  std::vector<std::vector<Row>> attending;
  for (const auto& [token, head] : keys) attending.push_back(rows_of(t, seen, token, head));
  std::vector<Vector> dq(rows.size()), dk(keys.size()), dv(keys.size());
  in_parallel(rows.size(), [&](std::size_t i) { dq[i] = expected_dq(t, seen, values[i]); });
  in_parallel(keys.size(), [&](std::size_t i) {
    KeySlopes slopes = expected_key(t, attending[i], keys[i].first);
    dk[i] = std::move(slopes.dk), dv[i] = std::move(slopes.dv);
  });
  const auto no_row = [&](std::size_t i) { return attending[i].empty(); };
  expect_rows("dq", t.gradients.dq, rows, dq, [](std::size_t) { return false; });
  expect_rows("dk", t.gradients.dk, keys, dk, no_row);
  expect_rows("dv", t.gradients.dv, keys, dv, no_row);
}

void expect_big(const Sources& sources, bool with_dense) {
  for (const std::string& family : families(sources.b.problem())) {
    SCOPED_TRACE(family);
    const Training training(sources, family);
    std::printf("%s: %s, workspace of backward %zu MiB\n", family.c_str(), training.plan.kernels().c_str(),
                training.plan.backward_workspace_bytes() >> 20);
    expect_gradients(training, false);
    if (with_dense) expect_gradients(training, true);
  }
}

class CudaBigBackward : public CudaBig {};

// Many heads, so that few tokens do, and of few rows to a key, which float64 then has time for.
TEST_F(CudaBigBackward, QueriesBeyondTwoToThe31Elements) {
  if (!fits(std::size_t{26} << 30)) GTEST_SKIP() << "needs 26 GiB of free device memory";
  const Big b{.q_tokens = 65'603, .k_tokens = 65'603, .q_heads = 256, .kv_heads = 64, .block_size = 256, .top_k = 2};
  ASSERT_GT(b.q_tokens * b.q_heads * kDim, std::int64_t{1} << 31);
  expect_big(Sources(b, 1009, 997, 5003), false);
}

TEST_F(CudaBigBackward, KeysBeyondTwoToThe31Elements) {
  if (!fits(std::size_t{24} << 30)) GTEST_SKIP() << "needs 24 GiB of free device memory";
  const Big b{.q_tokens = 70, .k_tokens = 1'050'005, .q_heads = 16, .kv_heads = 16, .block_size = 128, .top_k = 4};
  ASSERT_GT(b.k_tokens * b.kv_heads * kDim, std::int64_t{1} << 31);
  expect_big(Sources(b, 70, 70, 20011), true);
}

// 64K tokens, 16 heads.
void expect_thirty_the_same(std::int64_t block_size, std::int64_t top_k) {
  const Big b{
      .q_tokens = 65'536, .k_tokens = 65'536, .q_heads = 16, .kv_heads = 16, .block_size = block_size, .top_k = top_k};
  const Sources sources(b, 4001, 4003, 20011);
  for (const std::string& family : families(b.problem())) {
    SCOPED_TRACE(::testing::Message() << "B = " << block_size << ", " << family);
    const Training training(sources, family);
    const auto digests = [&] {
      const Gradients& g = training.gradients;
      std::vector<bench::Digest> all;
      for (const Tensor* x : {&training.outputs.out, &g.dq, &g.dk, &g.dv}) {
        all.push_back(bench::digest_of(*x, test_stream()));
      }
      return all;
    };
    training.run(false);
    const std::vector<bench::Digest> expected = digests();
    for (const bench::Digest& digest : expected) EXPECT_EQ(digest.not_finite, 0u);
    for (int i = 0; i < 30; ++i) {
      training.run(false);
      ASSERT_TRUE(digests() == expected) << "run " << i;
    }
  }
}

TEST_F(CudaBigBackward, ThirtyRunsGiveTheSameBits) {
  if (!fits(std::size_t{6} << 30)) GTEST_SKIP() << "needs 6 GiB of free device memory";
  expect_thirty_the_same(128, 8);
  expect_thirty_the_same(64, 16);
}

}  // namespace
}  // namespace moba::test
