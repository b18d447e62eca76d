#include "decode_figures.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "buffer.h"
#include "moba/moba.h"
#include "random_inputs.h"
#include "timing.h"

namespace moba::bench {

namespace {

constexpr std::int64_t kTokens = 131072, kQHeads = 8, kKvHeads = 2, kDim = 128, kBlock = 128, kTopK = 8;
// Queries taken in turn: one query over and over would find its blocks in the second-level cache.
constexpr std::int64_t kQueries = 64;

CacheProblem problem_of(std::int64_t new_tokens, std::int64_t top_k) {
  CacheProblem problem;
  problem.q_heads = kQHeads;
  problem.kv_heads = kKvHeads;
  problem.head_dim = kDim;
  problem.max_new_tokens = new_tokens;
  problem.max_length = kTokens;
  problem.config.block_size = kBlock;
  problem.config.top_k = top_k;
  return problem;
}

Problem one_query() {
  Problem problem;
  problem.q_heads = kQHeads;
  problem.kv_heads = kKvHeads;
  problem.head_dim = kDim;
  problem.total_q = 1;
  problem.total_k = kTokens;
  return problem;
}

Options options_of(int threads) {
  Options options;
  options.threads = threads;
  return options;
}

std::size_t bytes(std::int64_t tokens, std::int64_t heads) {
  return static_cast<std::size_t>(tokens * heads * kDim) * sizeof(float);
}

// A cache of one sequence, float32, full, the tokens of a head one after the other; and queries of its last token.
class FullCache {
 public:
  explicit FullCache(int threads)
      : moba_(problem_of(1, kTopK), options_of(threads)),
        full_(problem_of(1, std::numeric_limits<std::int32_t>::max()), options_of(threads)),
        dense_(one_query(), options_of(threads)),
        k_(bytes(kTokens, kKvHeads)),
        v_(k_.size()),
        centroids_(bytes(kTokens / kBlock, kKvHeads)),
        queries_(bytes(kQueries, kQHeads)),
        out_(bytes(1, kQHeads)),
        ids_(static_cast<std::size_t>(kQHeads * kTopK) * sizeof(std::int32_t)),
        copy_(k_.size()) {
    const std::array<std::int64_t, 4> heads_first{kTokens * kKvHeads * kDim, kDim, kTokens * kDim, 1};
    cache_.k = Tensor(k_.data(), DType::f32, {1, kTokens, kKvHeads, kDim});
    cache_.v = Tensor(v_.data(), DType::f32, {1, kTokens, kKvHeads, kDim});
    cache_.k.stride = cache_.v.stride = heads_first;
    cache_.centroids = Tensor(centroids_.data(), DType::f32, {1, kTokens / kBlock, kKvHeads, kDim});
    cache_.lengths = ConstTensor(&length_, DType::i32, {1});
    fill(options_of(threads));
    std::size_t most = std::max(moba_.workspace_bytes(), full_.workspace_bytes());
    workspace_ = cli::Buffer(std::max(most, dense_.workspace_bytes()));
  }
  FullCache(const FullCache&) = delete;
  FullCache& operator=(const FullCache&) = delete;

  void moba() { decode(moba_, next_query(), {}, cache_, {out(), {}, {}}, workspace_.span()); }
  // The same way of reading, all blocks.
  void full() { decode(full_, next_query(), {}, cache_, {out(), {}, {}}, workspace_.span()); }
  // What there is without a cache of one's own: full attention of one query.
  void dense() {
    Inputs inputs;
    inputs.q = next_query();
    inputs.k = tokens_of(cache_.k);
    inputs.v = tokens_of(cache_.v);
    Outputs outputs;
    outputs.out = out();
    moba::dense(dense_, inputs, outputs, workspace_.span());
  }
  // As much memory as the keys take, by as many threads as decode.
  void copy() {
    const int parts = moba_.threads();
    std::vector<std::jthread> workers;
    for (int i = 0; i < parts; ++i) {
      const std::size_t part = k_.size() / static_cast<std::size_t>(parts), begin = part * static_cast<std::size_t>(i);
      const std::size_t end = i + 1 == parts ? k_.size() : begin + part;
      workers.emplace_back([this, begin, end] { std::memcpy(copy_.data() + begin, k_.data() + begin, end - begin); });
    }
  }

  // Bytes that copy reads and writes.
  double copied_bytes() const { return 2.0 * static_cast<double>(k_.size()); }
  // Bytes that decode must read for a token, on average: the centroids of the past blocks, the keys and values of each
  // block that any query head of the key head chose.
  double needed_bytes() {
    double blocks = 0;
    for (std::int64_t i = 0; i < kQueries; ++i) {
      const Tensor ids(ids_.data(), DType::i32, {1, kQHeads, kTopK});
      decode(moba_, next_query(), {}, cache_, {out(), {}, ids}, workspace_.span());
      std::set<std::int64_t> chosen;
      for (std::int64_t j = 0; j < kQHeads * kTopK; ++j) {
        const std::int64_t head = j / kTopK / (kQHeads / kKvHeads);
        chosen.insert(head * (kTokens / kBlock) + ids_.as<std::int32_t>()[j]);
      }
      blocks += static_cast<double>(chosen.size()) / kQueries;
    }
    return blocks * 2 * static_cast<double>(bytes(kBlock, 1)) +
           static_cast<double>(bytes(kTokens / kBlock - 1, kKvHeads));
  }
  std::string kernels() const { return moba_.kernels(); }

 private:
  void fill(const Options& options) {
    Problem all = one_query();
    all.total_q = kQueries;
    const cli::RandomInputs random(all, {0, kQueries}, {0, kTokens}, 1);
    std::memcpy(queries_.data(), random.q.data(), queries_.size());
    const CachePlan plan(problem_of(kTokens, kTopK), options);
    const cli::Buffer workspace(plan.workspace_bytes());
    append(plan, random.inputs.k, random.inputs.v, {}, cache_, workspace.span());
  }

  Tensor out() { return Tensor(out_.data(), DType::f32, {1, kQHeads, kDim}); }
  ConstTensor next_query() {
    query_ = (query_ + 1) % kQueries;
    return ConstTensor(queries_.data() + static_cast<std::size_t>(query_) * bytes(1, kQHeads), DType::f32,
                       {1, kQHeads, kDim});
  }
  static ConstTensor tokens_of(const Tensor& x) {
    ConstTensor tokens(x.data, DType::f32, {kTokens, kKvHeads, kDim});
    tokens.stride = {x.stride[1], x.stride[2], x.stride[3], 0};
    return tokens;
  }

  const CachePlan moba_, full_;
  const Plan dense_;
  cli::Buffer k_, v_, centroids_, queries_, out_, ids_, copy_, workspace_;
  std::int32_t length_ = kTokens;
  std::int64_t query_ = 0;
  Cache cache_;
};

void figure(const char* name, double value, const char* unit) {
  std::printf("figure cpu.%s %.4g %s\n", name, value, unit);
  std::fflush(stdout);
}

}  // namespace

void decode_figures(int threads, int repetitions) {
  FullCache cache(threads);
  std::fprintf(stderr, "decode: %s\n", cache.kernels().c_str());
  Timed things;
  things["decode"] = [&] { cache.moba(); };
  things["decode_full"] = [&] { cache.full(); };
  things["decode_dense"] = [&] { cache.dense(); };
  things["copy"] = [&] { cache.copy(); };
  const auto seconds = best_seconds(things, repetitions);
  const double needed = cache.needed_bytes(), rate = needed / seconds.at("decode") / 1e9;
  const double copy = cache.copied_bytes() / seconds.at("copy") / 1e9;
  figure("copy", copy, "GB/s");
  figure("decode", seconds.at("decode") * 1e6, "us");
  figure("decode_full", seconds.at("decode_full") * 1e3, "ms");
  figure("decode_dense", seconds.at("decode_dense") * 1e3, "ms");
  figure("decode_speedup", seconds.at("decode_dense") / seconds.at("decode"), "ratio");
  figure("decode_over_full", seconds.at("decode_full") / seconds.at("decode"), "ratio");
  figure("decode_read", needed / 1e6, "MB");
  figure("decode_rate", rate, "GB/s");
  figure("decode_bandwidth", rate / copy, "ratio");
}

}  // namespace moba::bench
