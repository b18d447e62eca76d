// What to compute: the parameters of MoBA (arXiv 2502.13189) and of the rotary position embedding. docs/spec.md defines
// every term.
#pragma once

#include <cstdint>
#include <optional>

#include "moba/tensor.h"

namespace moba {

struct Config {
  std::int64_t block_size = 128;  // B, keys per block, >= 1; blocks restart at each sequence, the last may be short
  std::int64_t top_k = 8;         // k >= 1 blocks per (query, query head); causal: the own block counts among them
  bool causal = true;             // token-level causal mask, bottom-right aligned where len_q != len_k
  std::optional<double>
      scale;  // factor on q . k in the attention, up to 2e38 either way; default 1 / sqrt(d). The gate never scales
};

enum class RopeStyle : std::uint8_t {
  half_split,   // NeoX: dimension i pairs with i + rotary_dim / 2
  interleaved,  // GPT-J: dimension 2i pairs with 2i + 1
};

enum class RopeScaling : std::uint8_t { none, linear, llama3, yarn };

// Rotary position embedding of q and k (never v), arXiv 2104.09864. Positions are absolute within a sequence: key j
// sits at j, query i at len_k - len_q + i.
struct Rope {
  RopeStyle style = RopeStyle::half_split;
  std::int64_t rotary_dim = 0;  // even, <= d; the dimensions from rotary_dim on pass unrotated; 0 means d
  double base = 10000.0;        // >= 1; inverse frequency of pair i: base^(-2i / rotary_dim)
  RopeScaling scaling = RopeScaling::none;
  double factor = 1.0;                     // linear, llama3, yarn: context extension factor, >= 1
  double original_max_position = 8192;     // llama3, yarn: context length of the unscaled model, in tokens
  double low_freq_factor = 1.0;            // llama3
  double high_freq_factor = 4.0;           // llama3, > low_freq_factor
  double beta_fast = 32.0;                 // yarn: rotations at original_max_position above which nothing is scaled
  double beta_slow = 1.0;                  // yarn: rotations below which everything is; < beta_fast
  std::optional<double> attention_factor;  // yarn: factor on cos and sin; default 0.1 ln(factor) + 1

  // A table of the caller's own, f32 [positions, rotary_dim / 2] each, row = position; used instead of base and scaling
  // when both are given. Must outlive the calls that use it.
  ConstTensor cos, sin;
};

}  // namespace moba
