// The program of README.md, letter by letter and laid out as there: check_listing.cmake compares the two.
// clang-format off
#include <moba/moba.h>
#include <vector>

int main() {
  const std::int64_t tokens = 4096, q_heads = 8, kv_heads = 2, d = 64;
  std::vector<float> q(tokens * q_heads * d, 0.1f), k(tokens * kv_heads * d, 0.1f), v(k), out(q.size());

  moba::Problem problem;               // shapes; dtype is f32 unless set
  problem.q_heads = q_heads, problem.kv_heads = kv_heads, problem.head_dim = d;
  problem.total_q = problem.total_k = tokens;
  problem.config.block_size = 128, problem.config.top_k = 8;
  problem.rope = moba::Rope{};         // leave it out if q and k are rotated already

  const moba::Plan plan(problem);      // once; says what memory a call takes
  std::vector<std::byte> workspace(plan.workspace_bytes());
  using moba::DType;
  moba::forward(plan,
                {.q = {q.data(), DType::f32, {tokens, q_heads, d}},
                 .k = {k.data(), DType::f32, {tokens, kv_heads, d}},
                 .v = {v.data(), DType::f32, {tokens, kv_heads, d}}, .cu_seqlens_q = {}, .cu_seqlens_k = {}},
                {.out = moba::Tensor(out.data(), DType::f32, {tokens, q_heads, d}), .lse = {}}, workspace);
}
