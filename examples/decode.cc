// A server in small: two sequences with a paged cache, the prompts in chunks, then token by token, with RoPE. One plan
// serves every call. At the end the last token's result is held against one prefill of the whole sequence.
#include <moba/moba.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

namespace {

constexpr std::int64_t kQueryHeads = 4, kKeyHeads = 2, kHeadDim = 64, kPageSize = 32, kPages = 64, kMaxPages = 32;
constexpr std::int64_t kQueryRow = kQueryHeads * kHeadDim, kKeyRow = kKeyHeads * kHeadDim;
constexpr std::int64_t kMaxLength = kMaxPages * kPageSize, kSequences = 2, kChunk = 256;

std::vector<float> made_up(std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  return values;
}

// What the model would compute for each token of a sequence.
struct Tokens {
  explicit Tokens(unsigned seed)
      : q(made_up(kMaxLength * kQueryRow, seed)),
        k(made_up(kMaxLength * kKeyRow, seed + 1)),
        v(made_up(kMaxLength * kKeyRow, seed + 2)) {}
  std::vector<float> q, k, v;
};

moba::CacheProblem cache_problem() {
  moba::CacheProblem problem;
  problem.q_heads = kQueryHeads;
  problem.kv_heads = kKeyHeads;
  problem.head_dim = kHeadDim;
  problem.max_batch = kSequences;
  problem.max_new_tokens = kSequences * kChunk;
  problem.max_length = kMaxLength;
  problem.config.block_size = 64;
  problem.config.top_k = 4;
  problem.rope = moba::Rope{};  // the cache then holds rotated keys
  return problem;
}

// The memory of one layer's cache and the tables that all layers share.
class Server {
 public:
  Server() : plan_(cache_problem()), workspace_(plan_.workspace_bytes()) {
    cache_.k = {k_.data(), moba::DType::f32, {kPages, kPageSize, kKeyHeads, kHeadDim}};
    cache_.v = {v_.data(), moba::DType::f32, {kPages, kPageSize, kKeyHeads, kHeadDim}};
    cache_.centroids = {centroids_.data(), moba::DType::f32, {kSequences, plan_.max_blocks(), kKeyHeads, kHeadDim}};
    cache_.lengths = {lengths_.data(), moba::DType::i32, {kSequences}};
    cache_.block_table = {table_.data(), moba::DType::i32, {kSequences, kMaxPages}};
  }

  std::int64_t length(std::size_t s) const { return lengths_[s]; }

  // Runs so many more tokens of each sequence; returns out, [new tokens, Hq, d].
  std::vector<float> run(const std::vector<Tokens>& tokens, const std::vector<std::int64_t>& fresh) {
    std::vector<float> q, k, v;
    std::vector<std::int32_t> cu{0};
    for (std::size_t s = 0; s < tokens.size(); ++s) {
      const std::int64_t begin = lengths_[s], end = begin + fresh[s];
      q.insert(q.end(), tokens[s].q.begin() + begin * kQueryRow, tokens[s].q.begin() + end * kQueryRow);
      k.insert(k.end(), tokens[s].k.begin() + begin * kKeyRow, tokens[s].k.begin() + end * kKeyRow);
      v.insert(v.end(), tokens[s].v.begin() + begin * kKeyRow, tokens[s].v.begin() + end * kKeyRow);
      cu.push_back(static_cast<std::int32_t>(cu.back() + fresh[s]));
      grow(s, end);
    }
    const std::int64_t total = cu.back();
    std::vector<float> out(q.size());
    const moba::ConstTensor starts(cu.data(), moba::DType::i32, {kSequences + 1});
    // In a model: the layers, one after the other, each with a cache of its own and these same tables.
    moba::append(plan_, {k.data(), moba::DType::f32, {total, kKeyHeads, kHeadDim}},
                 {v.data(), moba::DType::f32, {total, kKeyHeads, kHeadDim}}, starts, cache_, workspace_);
    moba::DecodeOutputs outputs;
    outputs.out = {out.data(), moba::DType::f32, {total, kQueryHeads, kHeadDim}};
    moba::decode(plan_, {q.data(), moba::DType::f32, {total, kQueryHeads, kHeadDim}}, starts, cache_, outputs,
                 workspace_);
    return out;
  }

 private:
  // The lengths count the new tokens, and every token has a page, before append is called.
  void grow(std::size_t s, std::int64_t length) {
    for (std::int64_t page = (lengths_[s] + kPageSize - 1) / kPageSize; page * kPageSize < length; ++page) {
      table_[s * kMaxPages + static_cast<std::size_t>(page)] = next_page_++;
    }
    lengths_[s] = static_cast<std::int32_t>(length);
  }

  moba::CachePlan plan_;
  std::vector<std::byte> workspace_;
  std::vector<float> k_ = std::vector<float>(kPages * kPageSize * kKeyRow), v_ = k_;
  std::vector<float> centroids_ =
      std::vector<float>(static_cast<std::size_t>(kSequences * plan_.max_blocks() * kKeyRow));
  std::vector<std::int32_t> lengths_ = std::vector<std::int32_t>(kSequences),
                            table_ = std::vector<std::int32_t>(kSequences * kMaxPages);
  std::int32_t next_page_ = 0;
  moba::Cache cache_;
};

// The last token of one prefill of the first `length` tokens.
std::vector<float> prefill(const Tokens& tokens, std::int64_t length) {
  moba::Problem problem;
  problem.q_heads = kQueryHeads;
  problem.kv_heads = kKeyHeads;
  problem.head_dim = kHeadDim;
  problem.total_q = problem.total_k = length;
  problem.config = cache_problem().config;
  problem.rope = moba::Rope{};
  const moba::Plan plan(problem);
  std::vector<std::byte> workspace(plan.workspace_bytes());
  std::vector<float> out(static_cast<std::size_t>(length * kQueryRow));
  moba::Inputs inputs;
  inputs.q = {tokens.q.data(), moba::DType::f32, {length, kQueryHeads, kHeadDim}};
  inputs.k = {tokens.k.data(), moba::DType::f32, {length, kKeyHeads, kHeadDim}};
  inputs.v = {tokens.v.data(), moba::DType::f32, {length, kKeyHeads, kHeadDim}};
  moba::Outputs outputs;
  outputs.out = {out.data(), moba::DType::f32, {length, kQueryHeads, kHeadDim}};
  moba::forward(plan, inputs, outputs, workspace);
  return {out.end() - kQueryRow, out.end()};
}

int run() {
  const std::vector<Tokens> tokens{Tokens(1), Tokens(5)};
  Server server;
  server.run(tokens, {kChunk, 100});  // the first prompt in two chunks, the second in one
  server.run(tokens, {kChunk, 0});
  std::vector<float> out;
  for (int i = 0; i < 50; ++i) out = server.run(tokens, {1, 1});
  float off = 0;
  for (std::size_t s = 0; s < kSequences; ++s) {
    const std::vector<float> expected = prefill(tokens[s], server.length(s));
    for (std::size_t i = 0; i < expected.size(); ++i)
      off = std::max(off, std::fabs(expected[i] - out[s * kQueryRow + i]));
  }
  std::printf("%d and %d tokens cached; decode and one prefill: largest difference %g\n",
              static_cast<int>(server.length(0)), static_cast<int>(server.length(1)), static_cast<double>(off));
  return off < 1e-5f ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode: %s\n", error.what());
    return 1;
  }
}
