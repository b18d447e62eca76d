#include "describe.h"

#include <array>
#include <charconv>

#include "moba/info.h"
#include "names.h"
#include "text.h"

namespace moba::cli {
namespace {

std::string describe_rope(const Rope& rope, std::int64_t head_dim) {
  std::string text(word_of(rope.style, kRopeStyles));
  text += format(" base %g", rope.base);
  if (rope.rotary_dim != 0 && rope.rotary_dim != head_dim) text += " dim " + std::to_string(rope.rotary_dim);
  if (rope.scaling != RopeScaling::none) {
    text += ' ';
    text += word_of(rope.scaling, kRopeScalings);
    text += format(" factor %g", rope.factor);
  }
  return text;
}

// The shortest digits that give the same number again.
std::string exact(double value) {
  std::array<char, 32> digits;
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr};
}

void add_rope(std::map<std::string, std::string>& entries, const Rope& rope) {
  entries["rope_style"] = word_of(rope.style, kRopeStyles);
  entries["rope_rotary_dim"] = std::to_string(rope.rotary_dim);
  entries["rope_base"] = exact(rope.base);
  entries["rope_scaling"] = word_of(rope.scaling, kRopeScalings);
  if (rope.scaling == RopeScaling::none) return;
  entries["rope_factor"] = exact(rope.factor);
  if (rope.scaling == RopeScaling::linear) return;
  entries["rope_original_max_position"] = exact(rope.original_max_position);
  if (rope.scaling == RopeScaling::llama3) {
    entries["rope_low_freq_factor"] = exact(rope.low_freq_factor);
    entries["rope_high_freq_factor"] = exact(rope.high_freq_factor);
  } else {
    entries["rope_beta_fast"] = exact(rope.beta_fast);
    entries["rope_beta_slow"] = exact(rope.beta_slow);
    if (rope.attention_factor) entries["rope_attention_factor"] = exact(*rope.attention_factor);
  }
}

}  // namespace

std::string describe_attention(const Problem& problem, bool blocks) {
  const Config& config = problem.config;
  std::string text = blocks
                         ? "block size " + std::to_string(config.block_size) + ", top-k " + std::to_string(config.top_k)
                         : "full attention";
  text += config.causal ? ", causal" : ", not causal";
  if (config.scale) text += format(", scale %g", *config.scale);
  if (problem.rope) text += ", rope " + describe_rope(*problem.rope, problem.head_dim);
  return text;
}

std::map<std::string, std::string> describe_output(const Problem& problem, bool blocks) {
  std::map<std::string, std::string> entries{{"producer", std::string("moba ") + version()},
                                             {"attention", blocks ? "moba" : "dense"},
                                             {"causal", problem.config.causal ? "true" : "false"}};
  if (blocks) {
    entries["block_size"] = std::to_string(problem.config.block_size);
    entries["top_k"] = std::to_string(problem.config.top_k);
  }
  if (problem.config.scale) entries["scale"] = exact(*problem.config.scale);
  if (problem.rope) add_rope(entries, *problem.rope);
  return entries;
}

std::string list(const std::vector<NamedTensor>& tensors) {
  std::string text;
  for (const NamedTensor& named : tensors) {
    text += (text.empty() ? "" : ", ") + named.name + " " + moba::describe(named.tensor);
  }
  return text;
}

}  // namespace moba::cli
