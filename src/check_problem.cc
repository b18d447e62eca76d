// Refusals of a plan: its problem and its options.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "checks.h"
#include "cpu/bf16_dot.h"
#include "cpu/targets.h"
#include "cuda/backend.h"
#include "refuse.h"

namespace moba {

namespace {

constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();
constexpr int kMaxThreads = 1024;

void check_rope(Rope& rope, const Problem& problem, const Options& options) {
  if (rope.rotary_dim == 0) rope.rotary_dim = problem.head_dim;
  if (rope.style != RopeStyle::half_split && rope.style != RopeStyle::interleaved) {
    refuse("rope.style", static_cast<int>(rope.style), "half_split, interleaved");
  }
  if (rope.rotary_dim % 2 != 0 || rope.rotary_dim < 2 || rope.rotary_dim > problem.head_dim) {
    refuse("rope.rotary_dim", rope.rotary_dim,
           "even numbers from 2 to head_dim (" + std::to_string(problem.head_dim) + ")");
  }
  if (rope.cos.given() != rope.sin.given())
    refuse(rope.cos.given() ? "rope.sin" : "rope.cos", "not given", "both or none");
  if (rope.cos.given()) {
    const Device device = options.backend == Backend::cuda ? Device::cuda : Device::cpu;
    check_tensor(device, options.cuda_device, rope.cos, {"rope.cos", DType::f32, {-1, rope.rotary_dim / 2}});
    check_tensor(device, options.cuda_device, rope.sin,
                 {"rope.sin", DType::f32, {rope.cos.shape[0], rope.rotary_dim / 2}});
    if (rope.cos.shape[0] < problem.max_seqlen_k) {
      refuse("rope.cos", describe(rope.cos),
             "at least max_seqlen_k (" + std::to_string(problem.max_seqlen_k) + ") rows");
    }
    return;
  }
  // From 1 on no frequency is above 1 radian a token.
  if (!(rope.base >= 1) || !std::isfinite(rope.base)) refuse("rope.base", rope.base, "finite numbers from 1");
  switch (rope.scaling) {
    case RopeScaling::none:
      return;
    case RopeScaling::yarn:
      check_positive("rope.beta_slow", rope.beta_slow);
      check_positive("rope.beta_fast", rope.beta_fast);
      if (rope.beta_fast <= rope.beta_slow) refuse("rope.beta_fast", rope.beta_fast, "numbers above rope.beta_slow");
      if (rope.base <= 1) refuse("rope.base", rope.base, "numbers above 1 with yarn");
      if (rope.attention_factor) {
        check_positive("rope.attention_factor", *rope.attention_factor);
        if (*rope.attention_factor > std::numeric_limits<float>::max()) {
          refuse("rope.attention_factor", *rope.attention_factor, "numbers that float32 holds");
        }
      }
      break;
    case RopeScaling::llama3:
      check_positive("rope.low_freq_factor", rope.low_freq_factor);
      check_positive("rope.high_freq_factor", rope.high_freq_factor);
      if (rope.high_freq_factor <= rope.low_freq_factor) {
        refuse("rope.high_freq_factor", rope.high_freq_factor, "numbers above rope.low_freq_factor");
      }
      break;
    case RopeScaling::linear:
      break;
    default:
      refuse("rope.scaling", static_cast<int>(rope.scaling), "none, linear, llama3, yarn");
  }
  if (!(rope.factor >= 1) || !std::isfinite(rope.factor)) refuse("rope.factor", rope.factor, "finite numbers from 1");
  check_positive("rope.original_max_position", rope.original_max_position);
}

void check_options(const Options& options, const Problem& problem) {
  if (options.backend != Backend::cpu && options.backend != Backend::reference && options.backend != Backend::cuda) {
    refuse("options.backend", static_cast<int>(options.backend), "cpu, reference, cuda");
  }
  if (options.backend == Backend::cuda) cuda::check_device(options.cuda_device);
  check_range("options.threads", options.threads, 0, kMaxThreads);
  if (cpu::find_target(options.cpu_target) == 0) {
    std::string names;
    for (const std::string& target : cpu_targets()) names += (names.empty() ? "" : ", ") + target;
    refuse("options.cpu_target", "'" + options.cpu_target + "'", names);
  }
  switch (options.bf16_products) {
    case Bf16Products::automatic:
    case Bf16Products::widen:
      return;
    case Bf16Products::dot:
      break;
    default:
      refuse("options.bf16_products", static_cast<int>(options.bf16_products), "automatic, widen, dot");
  }
  if (problem.dtype != DType::bf16)
    refuse("options.bf16_products", "dot", "automatic or widen, where dtype is not bf16");
  if (!cpu::bf16_dot_support().available || !MOBA_IS_AVX512(cpu::find_target(options.cpu_target))) {
    refuse("options.bf16_products", "dot", "automatic or widen on this processor and target, which has no AVX512_BF16");
  }
}

}  // namespace

Problem checked(Problem p, const Options& options) {
  if (p.dtype != DType::f32 && p.dtype != DType::f16 && p.dtype != DType::bf16) {
    refuse("dtype", name(p.dtype), "f32, f16, bf16");
  }
  check_range("kv_heads", p.kv_heads, 1, kMaxRows);
  check_range("q_heads", p.q_heads, 1, kMaxRows);
  if (p.q_heads % p.kv_heads != 0)
    refuse("q_heads", p.q_heads, "multiples of kv_heads (" + std::to_string(p.kv_heads) + ")");
  check_range("head_dim", p.head_dim, 8, 256);
  check_range("batch", p.batch, 0, kMaxRows);
  check_range("total_q", p.total_q, 0);
  check_range("total_k", p.total_k, 0);
  if (p.batch == 0 && (p.total_q > 0 || p.total_k > 0)) refuse("batch", p.batch, "1 or more where there are tokens");
  check_range("max_seqlen_q", p.max_seqlen_q, 0);
  check_range("max_seqlen_k", p.max_seqlen_k, 0);
  p.max_seqlen_q = p.max_seqlen_q == 0 ? p.total_q : std::min(p.max_seqlen_q, p.total_q);
  p.max_seqlen_k = p.max_seqlen_k == 0 ? p.total_k : std::min(p.max_seqlen_k, p.total_k);
  check_range("config.block_size", p.config.block_size, 1);
  check_range("config.top_k", p.config.top_k, 1);
  // The backends fold log2(e) into it, in float32.
  constexpr double kMaxScale = std::numeric_limits<float>::max() / 1.5;
  if (p.config.scale && !(std::fabs(*p.config.scale) <= kMaxScale)) {
    refuse("config.scale", *p.config.scale, "finite numbers up to 2e38 either way");
  }
  if (!p.config.scale) p.config.scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));

  const std::int64_t group = p.q_heads / p.kv_heads;
  if (checked_product("total_q * q_heads / kv_heads", {p.total_q, group}) > kMaxRows) {
    refuse("total_q", p.total_q, "q_heads / kv_heads * total_q up to " + std::to_string(kMaxRows));
  }
  if (p.total_k > kMaxRows) refuse("total_k", p.total_k, "up to " + std::to_string(kMaxRows));
  checked_product("total_q * q_heads * head_dim", {p.total_q, p.q_heads, p.head_dim});
  checked_product("total_k * kv_heads * head_dim", {p.total_k, p.kv_heads, p.head_dim});
  const std::int64_t blocks = std::max<std::int64_t>(1, ceil_div(p.max_seqlen_k, p.config.block_size));
  checked_product("total_q * q_heads * min(top_k, blocks)", {p.total_q, p.q_heads, std::min(p.config.top_k, blocks)});
  check_options(options, p);
  if (p.rope) check_rope(*p.rope, p, options);
  return p;
}

}  // namespace moba
