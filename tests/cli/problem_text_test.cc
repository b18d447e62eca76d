// Problems given as text.
#include "problem_text.h"

#include <gtest/gtest.h>

#include <string>

#include "moba/error.h"
#include "text.h"

namespace moba::cli {
namespace {

TEST(ProblemText, FillsInDefaults) {
  const TextProblem text = parse_problem("tokens=100 q_heads=6");
  EXPECT_EQ(text.problem.total_q, 100);
  EXPECT_EQ(text.problem.total_k, 100);
  EXPECT_EQ(text.problem.kv_heads, 6);
  EXPECT_EQ(text.problem.head_dim, 128);
  EXPECT_EQ(text.problem.config.block_size, 128);
  EXPECT_EQ(text.problem.config.top_k, 8);
  EXPECT_TRUE(text.problem.config.causal);
  EXPECT_EQ(text.problem.dtype, DType::f32);
  EXPECT_FALSE(text.problem.rope);
  EXPECT_FALSE(text.problem.config.scale);
}

TEST(ProblemText, ReadsEveryKey) {
  const TextProblem text = parse_problem(
      " tq=3,tk=50 batch=4\tq_heads=8 kv_heads=2 d=64 block=16 topk=2 dtype=bf16 causal=0 scale=0.5 rope_base=1e5 "
      "threads=3 backend=reference target=X bf16_products=widen, ");
  EXPECT_EQ(text.seqlen_q, 3);
  EXPECT_EQ(text.seqlen_k, 50);
  EXPECT_EQ(text.problem.total_q, 12);
  EXPECT_EQ(text.problem.total_k, 200);
  EXPECT_EQ(text.problem.max_seqlen_k, 50);
  EXPECT_EQ(text.problem.batch, 4);
  EXPECT_EQ(text.problem.q_heads, 8);
  EXPECT_EQ(text.problem.kv_heads, 2);
  EXPECT_EQ(text.problem.head_dim, 64);
  EXPECT_EQ(text.problem.config.block_size, 16);
  EXPECT_EQ(text.problem.config.top_k, 2);
  EXPECT_FALSE(text.problem.config.causal);
  EXPECT_EQ(text.problem.config.scale, 0.5);
  EXPECT_EQ(text.problem.rope->base, 1e5);
  EXPECT_EQ(text.problem.dtype, DType::bf16);
  EXPECT_EQ(text.options.threads, 3);
  EXPECT_EQ(text.options.backend, Backend::reference);
  EXPECT_EQ(text.options.cpu_target, "X");
  EXPECT_EQ(text.options.bf16_products, Bf16Products::widen);
}

TEST(ProblemText, ComputesAsTheOptionsSayUnlessItSaysOtherwise) {
  Options options;
  options.backend = Backend::cuda;
  options.threads = 3;
  options.cuda_device = 1;
  options.cuda_kernels = "sm90";
  options.workspace_limit = 7;
  const Options kept = parse_problem("tokens=1", options).options;
  EXPECT_EQ(kept.backend, Backend::cuda);
  EXPECT_EQ(kept.threads, 3);
  EXPECT_EQ(kept.cuda_device, 1);
  EXPECT_EQ(kept.cuda_kernels, "sm90");
  EXPECT_EQ(kept.workspace_limit, 7u);
  const Options said =
      parse_problem("tokens=1 device=2 kernels=portable workspace_limit=3M threads=1", options).options;
  EXPECT_EQ(said.backend, Backend::cuda);
  EXPECT_EQ(said.threads, 1);
  EXPECT_EQ(said.cuda_device, 2);
  EXPECT_EQ(said.cuda_kernels, "portable");
  EXPECT_EQ(said.workspace_limit, std::size_t{3} << 20);
  EXPECT_EQ(parse_problem("tokens=1 backend=cpu", options).options.backend, Backend::cpu);
  EXPECT_EQ(parse_problem("tokens=1 backend=cuda").options.backend, Backend::cuda);
}

TEST(Bytes, AreReadWithTheirUnits) {
  EXPECT_EQ(parse_bytes("x", "1"), 1);
  EXPECT_EQ(parse_bytes("x", "3K"), 3072);
  EXPECT_EQ(parse_bytes("x", "512M"), std::int64_t{512} << 20);
  EXPECT_EQ(parse_bytes("x", "512MiB"), std::int64_t{512} << 20);
  EXPECT_EQ(parse_bytes("x", "2GiB"), std::int64_t{2} << 30);
  EXPECT_EQ(parse_bytes("x", "8388607T"), std::int64_t{8388607} << 40);
  for (const char* text :
       {"", "0", "-1", "0K", "K", "iB", "5iB", "1.5G", "1GB", "1 G", "1g", "1KK", "8388608T", " 1"}) {
    EXPECT_THROW(parse_bytes("x", text), Error) << text;
  }
}

// What describe says can be given again.
TEST(ProblemText, DescriptionIsAProblem) {
  for (const char* problem : {"tokens=7", "tq=1 tk=9 batch=2 scale=0.25 rope_base=500000 dtype=f16 causal=0"}) {
    const std::string once = describe(parse_problem(problem));
    EXPECT_EQ(describe(parse_problem(once)), once);
  }
}

TEST(ProblemText, HelpNamesEveryKey) {
  for (const char* key :
       {"tokens",        "tq",     "tk",      "batch",          "q_heads",   "kv_heads", "d",       "block",
        "topk",          "dtype",  "causal",  "scale",          "rope_base", "threads",  "backend", "target",
        "bf16_products", "device", "kernels", "workspace_limit"}) {
    EXPECT_NE(problem_text_help().find("\n  " + std::string(key) + " "), std::string::npos) << key;
  }
}

TEST(ProblemText, StartOffsets) {
  EXPECT_EQ(start_offsets(3, 5), (std::vector<std::int64_t>{0, 5, 10, 15}));
  EXPECT_EQ(start_offsets(0, 5), std::vector<std::int64_t>{0});
}

}  // namespace
}  // namespace moba::cli
