#include "describe.h"

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
                                             {"causal", problem.config.causal ? "true" : "false"},
                                             {"attention", blocks ? "moba" : "dense"}};
  if (blocks) {
    entries["block_size"] = std::to_string(problem.config.block_size);
    entries["top_k"] = std::to_string(problem.config.top_k);
  }
  if (problem.config.scale) entries["scale"] = format("%.17g", *problem.config.scale);
  if (problem.rope) entries["rope"] = describe_rope(*problem.rope, problem.head_dim);
  return entries;
}

}  // namespace moba::cli
