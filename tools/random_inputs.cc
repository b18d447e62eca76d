#include "random_inputs.h"

#include <limits>

#include "moba/error.h"
#include "numeric.h"

namespace moba::cli {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): one multiply-xor chain per number, so that large tensors fill in no time.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The sum of four 16-bit uniforms, made to have mean 0 and variance 1: near enough to a normal deviate.
float deviate(std::uint64_t bits) {
  const double sum =
      static_cast<double>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  return static_cast<float>((sum / 65536.0 - 2.0) * 1.7320508);
}

ConstTensor offsets(Buffer& memory, const std::vector<std::int64_t>& starts) {
  memory = Buffer(starts.size() * sizeof(std::int32_t));
  for (std::size_t i = 0; i < starts.size(); ++i) {
    if (starts[i] > std::numeric_limits<std::int32_t>::max()) {
      throw Error("problem: " + std::to_string(starts.back()) + " tokens in all; at most 2147483647 are allowed");
    }
    memory.as<std::int32_t>()[i] = static_cast<std::int32_t>(starts[i]);
  }
  return {memory.data(), DType::i32, {static_cast<std::int64_t>(starts.size())}};
}

}  // namespace

ConstTensor random_tensor(Buffer& memory, DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t d,
                          std::uint64_t seed) {
  const std::int64_t count = tokens * heads * d;
  seed = mix(seed);
  memory = Buffer(static_cast<std::size_t>(count) * size_in_bytes(dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    seed += 0x9e3779b97f4a7c15u;
    store_float(memory.data(), dtype, i, deviate(mix(seed)));
  }
  return {memory.data(), dtype, {tokens, heads, d}};
}

RandomInputs::RandomInputs(const Problem& problem, const std::vector<std::int64_t>& starts_q,
                           const std::vector<std::int64_t>& starts_k, std::uint64_t seed) {
  const std::int64_t d = problem.head_dim;
  inputs.q = random_tensor(q, problem.dtype, problem.total_q, problem.q_heads, d, seed);
  inputs.k = random_tensor(k, problem.dtype, problem.total_k, problem.kv_heads, d, seed + 1);
  inputs.v = random_tensor(v, problem.dtype, problem.total_k, problem.kv_heads, d, seed + 2);
  inputs.cu_seqlens_q = offsets(cu_seqlens_q, starts_q);
  inputs.cu_seqlens_k = offsets(cu_seqlens_k, starts_k);
}

}  // namespace moba::cli
