#include "cuda_problems.h"

#include <algorithm>

namespace moba::bench {

namespace {

constexpr std::int64_t kK = 1024;

// One causal sequence of bfloat16, 16 heads, d = 128.
CudaProblem one(std::string name, std::int64_t tokens, std::int64_t block_size, std::int64_t top_k) {
  CudaProblem made;
  made.name = std::move(name);
  made.problem.dtype = DType::bf16;
  made.problem.q_heads = made.problem.kv_heads = 16;
  made.problem.head_dim = 128;
  made.problem.total_q = made.problem.total_k = tokens;
  made.problem.config.block_size = block_size;
  made.problem.config.top_k = top_k;
  made.options.backend = Backend::cuda;
  made.starts = {0, tokens};
  return made;
}

CudaProblem target(std::string name, std::int64_t tokens, std::int64_t block_size) {
  CudaProblem made = one(std::move(name), tokens, block_size, 8);
  made.target = true;
  return made;
}

// What most others differ from in one thing.
CudaProblem like_64k(std::string name) { return one(std::move(name), 64 * kK, 128, 8); }

CudaProblem long_sequence(std::string name, std::int64_t tokens) {
  CudaProblem made = one(std::move(name), tokens, 128, 8);
  made.options.workspace_limit = std::size_t{8} << 30;
  return made;
}

CudaProblem heads(std::string name, std::int64_t q_heads, std::int64_t kv_heads) {
  CudaProblem made = like_64k(std::move(name));
  made.problem.q_heads = q_heads;
  made.problem.kv_heads = kv_heads;
  return made;
}

// 64K tokens cut at `starts`. k = 4: with 8 the short sequences would choose every block they have.
CudaProblem packed(std::string name, std::vector<std::int64_t> starts) {
  CudaProblem made = one(std::move(name), starts.back(), 128, 4);
  made.problem.batch = static_cast<std::int64_t>(starts.size()) - 1;
  for (std::size_t i = 1; i < starts.size(); ++i) {
    made.problem.max_seqlen_q = std::max(made.problem.max_seqlen_q, starts[i] - starts[i - 1]);
  }
  made.problem.max_seqlen_k = made.problem.max_seqlen_q;
  made.starts = std::move(starts);
  return made;
}

std::vector<std::int64_t> even_starts(std::int64_t sequences, std::int64_t length) {
  std::vector<std::int64_t> starts;
  for (std::int64_t i = 0; i <= sequences; ++i) starts.push_back(i * length);
  return starts;
}

// Each sequence half as long as the one before it, down to one token.
std::vector<std::int64_t> halving_starts(std::int64_t tokens) {
  std::vector<std::int64_t> starts = {0};
  for (std::int64_t left = tokens; left > 1; left /= 2) starts.push_back(tokens - left / 2);
  starts.push_back(tokens);
  return starts;
}

// Every row chooses block 0: the keys of it share a direction that all queries have a large part of.
CudaProblem sink() {
  CudaProblem made = like_64k("64k_sink");
  made.lean_q.length = 8;
  made.lean_k.length = 4;
  made.lean_k.tokens = made.problem.config.block_size;
  made.ratio_to = "64k";
  return made;
}

// Rows prefer the blocks of their own topic: sixteen of them, 1024 tokens at a time.
CudaProblem clustered() {
  CudaProblem made = like_64k("64k_clustered");
  made.lean_q = {.length = 6, .topic_tokens = kK, .topics = 16};
  made.lean_k = {.length = 2, .topic_tokens = kK, .topics = 16};
  made.ratio_to = "64k";
  return made;
}

}  // namespace

std::vector<CudaProblem> cuda_problems() {
  std::vector<CudaProblem> all = {target("8k", 8 * kK, 128), target("32k", 32 * kK, 128), target("64k", 64 * kK, 128),
                                  target("128k", 128 * kK, 128), target("64k_b512", 64 * kK, 512)};
  // For the picture of where MoBA and full attention cross.
  all.push_back(one("2k", 2 * kK, 128, 8));
  all.push_back(one("4k", 4 * kK, 128, 8));
  all.push_back(one("16k", 16 * kK, 128, 8));
  for (CudaProblem& problem : all) problem.dense = problem.problem.config.block_size == 128;

  all.push_back(sink());
  all.push_back(clustered());
  all.push_back(one("64k_b64_k16", 64 * kK, 64, 16));
  all.push_back(one("64k_b256", 64 * kK, 256, 8));
  all.push_back(one("64k_b1024", 64 * kK, 1024, 8));
  all.push_back(like_64k("64k_d64"));
  all.back().problem.head_dim = 64;
  all.push_back(like_64k("64k_f16"));
  all.back().problem.dtype = DType::f16;
  all.push_back(heads("64k_gqa16x4", 16, 4));
  all.push_back(heads("64k_gqa32x8", 32, 8));
  all.push_back(like_64k("64k_rope"));
  all.back().problem.rope = Rope{};
  all.back().stages = false;
  all.push_back(packed("packed_even", even_starts(64, kK)));
  all.push_back(packed("packed_mixed", halving_starts(64 * kK)));
  all.push_back(like_64k("64k_4gib"));
  all.back().options.workspace_limit = std::size_t{4} << 30;  // one pass
  all.push_back(like_64k("64k_portable"));
  all.back().options.cuda_kernels = "portable";
  all.push_back(long_sequence("256k", 256 * kK));
  all.push_back(long_sequence("512k", 512 * kK));
  all.push_back(long_sequence("1m", kK * kK));
  all.push_back(one("10m_1head", 10 * kK * kK, 4096, 12));
  all.back().problem.q_heads = all.back().problem.kv_heads = 1;
  return all;
}

}  // namespace moba::bench
