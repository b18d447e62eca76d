#include "options.h"

#include <CLI/CLI.hpp>
#include <array>
#include <limits>

#include "names.h"
#include "text.h"

namespace moba::cli {
namespace {

constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
const char* const kRopeGroup = "Rotary position embedding (off unless --rope or one of these is given)";
const char* const kExecutionGroup = "How to compute";

// An option whose text is handed to `read`; what that refuses is a mistake in the command line.
CLI::Option* add_text(CLI::App& app, const std::string& name, std::function<void(const std::string&)> read,
                      const std::string& type, const std::string& help) {
  const auto guarded = [read = std::move(read)](const std::string& text) {
    try {
      read(text);
    } catch (const Error& error) {
      throw CLI::ValidationError(error.what());
    }
  };
  return app.add_option_function<std::string>(name, guarded, help)->type_name(type);
}

CLI::Option* add_real(CLI::App& app, const std::string& name, std::function<void(double)> set,
                      const std::string& help) {
  const auto read = [name, set = std::move(set)](const std::string& text) { set(parse_real(name, text)); };
  return add_text(app, name, read, "X", help);
}

// One of `words`, which live forever.
template <class Words, class Set>
CLI::Option* add_word(CLI::App& app, const std::string& name, const Words& words, Set set, const std::string& help) {
  const auto read = [name, &words, set](const std::string& text) { set(parse_word(name, text, words)); };
  return add_text(app, name, read, list_words(words, "|"), help);
}

// Options that only the cuda backend reads.
constexpr std::array kCudaOptions{"--device", "--kernels", "--workspace-limit"};

// Numbers that only some of the scalings read.
struct ScalingNumber {
  const char* option;
  const char* help;
  void (*set)(Rope&, double);
  bool linear, llama3, yarn;  // which read it

  bool read_by(RopeScaling scaling) const {
    return (scaling == RopeScaling::linear && linear) || (scaling == RopeScaling::llama3 && llama3) ||
           (scaling == RopeScaling::yarn && yarn);
  }
};

constexpr std::array kScalingNumbers{
    ScalingNumber{"--rope-factor", "linear, llama3, yarn: context extension, >= 1",
                  [](Rope& rope, double x) { rope.factor = x; }, true, true, true},
    ScalingNumber{"--rope-original-max-position", "llama3, yarn: context of the unscaled model (default 8192)",
                  [](Rope& rope, double x) { rope.original_max_position = x; }, false, true, true},
    ScalingNumber{"--rope-low-freq-factor", "llama3 (default 1)",
                  [](Rope& rope, double x) { rope.low_freq_factor = x; }, false, true, false},
    ScalingNumber{"--rope-high-freq-factor", "llama3 (default 4)",
                  [](Rope& rope, double x) { rope.high_freq_factor = x; }, false, true, false},
    ScalingNumber{"--rope-beta-fast", "yarn (default 32)", [](Rope& rope, double x) { rope.beta_fast = x; }, false,
                  false, true},
    ScalingNumber{"--rope-beta-slow", "yarn (default 1)", [](Rope& rope, double x) { rope.beta_slow = x; }, false,
                  false, true},
    ScalingNumber{"--rope-attention-factor", "yarn (default 0.1 ln(factor) + 1)",
                  [](Rope& rope, double x) { rope.attention_factor = x; }, false, false, true},
};

void add_rope_options(CLI::App& app, AttentionOptions& attention) {
  // Any of the options turns RoPE on.
  const auto rope = [&attention]() -> Rope& { return attention.rope ? *attention.rope : attention.rope.emplace(); };
  app.add_flag_callback(
         "--rope", [rope] { rope(); }, "rotate q and k, with the defaults below")
      ->group(kRopeGroup);
  add_real(
      app, "--rope-base", [rope](double x) { rope().base = x; }, "base of the frequencies (default 10000)")
      ->group(kRopeGroup);
  add_word(
      app, "--rope-style", kRopeStyles, [rope](RopeStyle x) { rope().style = x; },
      "which dimensions pair up (default half-split)")
      ->group(kRopeGroup);
  add_int(
      app, "--rope-dim", 1, kAny, [rope](std::int64_t x) { rope().rotary_dim = x; },
      "rotate the first N dimensions, even (default: all)")
      ->group(kRopeGroup);
  add_word(
      app, "--rope-scaling", kRopeScalings, [rope](RopeScaling x) { rope().scaling = x; },
      "how a longer context changes the frequencies (default none)")
      ->group(kRopeGroup);
  for (const ScalingNumber& number : kScalingNumbers) {
    add_real(
        app, number.option, [rope, set = number.set](double x) { set(rope(), x); }, number.help)
        ->group(kRopeGroup);
  }
}

}  // namespace

void add_execution_options(CLI::App& app, Options& options) {
  add_word(
      app, "--backend", kBackends, [&options](Backend x) { options.backend = x; },
      "cpu: vectorised and threaded; reference: float64, slow; cuda: an NVIDIA GPU (default cpu)")
      ->group(kExecutionGroup);
  add_int(
      app, "--threads", 0, std::numeric_limits<int>::max(),
      [&options](std::int64_t x) { options.threads = static_cast<int>(x); },
      "at most N threads; results do not depend on it (default 0: one per core)")
      ->group(kExecutionGroup);
  add_text(
      app, "--cpu-target", [&options](const std::string& x) { options.cpu_target = x; }, "NAME",
      "instruction set, one that moba info lists (default: the best)")
      ->group(kExecutionGroup);
  add_word(
      app, "--bf16-products", kBf16Products, [&options](Bf16Products x) { options.bf16_products = x; },
      "how the cpu multiplies bfloat16 (default auto)")
      ->group(kExecutionGroup);
  add_int(
      app, "--device", 0, std::numeric_limits<int>::max(),
      [&options](std::int64_t x) { options.cuda_device = static_cast<int>(x); }, "cuda: which GPU (default 0)")
      ->group(kExecutionGroup);
  add_word(
      app, "--kernels", kCudaKernels, [&options](std::string_view x) { options.cuda_kernels = x; },
      "cuda: the family of kernels (default: the best for the GPU)")
      ->group(kExecutionGroup);
  add_text(
      app, "--workspace-limit",
      [&options](const std::string& x) {
        options.workspace_limit = static_cast<std::size_t>(parse_bytes("--workspace-limit", x));
      },
      "SIZE",
      "cuda: at most so much workspace, e.g. 512M (default: 2G, for backward 1408M to 2G, beyond rotated q and k and "
      "centroids)")
      ->group(kExecutionGroup);
}

void check_execution_options(const CLI::App& app, const Options& options) {
  if (options.backend == Backend::cuda) return;
  for (const char* option : kCudaOptions) {
    if (app.count(option) == 0) continue;
    throw CLI::ValidationError(std::string(option) + ": needs --backend cuda, but it is " + name(options.backend));
  }
}

CLI::Option* add_int(CLI::App& app, const std::string& name, std::int64_t low, std::int64_t high,
                     std::function<void(std::int64_t)> set, const std::string& help) {
  const auto read = [=, set = std::move(set)](const std::string& text) { set(parse_int(name, text, low, high)); };
  return add_text(app, name, read, "N", help);
}

void add_block_options(CLI::App& app, AttentionOptions& attention) {
  Config& config = attention.config;
  add_int(
      app, "--block-size", 1, kAny, [&config](std::int64_t x) { config.block_size = x; },
      "keys per block (default " + std::to_string(config.block_size) + ")");
  add_int(
      app, "--top-k", 1, kAny, [&config](std::int64_t x) { config.top_k = x; },
      "blocks per query, its own block among them (default " + std::to_string(config.top_k) + ")");
}

void add_attention_options(CLI::App& app, AttentionOptions& attention) {
  app.add_flag_callback(
      "--no-causal", [&attention] { attention.config.causal = false; }, "every query sees every key of its sequence");
  add_causal_attention_options(app, attention);
}

void add_causal_attention_options(CLI::App& app, AttentionOptions& attention) {
  add_real(
      app, "--scale", [&attention](double x) { attention.config.scale = x; },
      "factor on q . k in the attention (default 1 / sqrt(d))");
  add_rope_options(app, attention);
  add_execution_options(app, attention.options);
}

void add_check_option(CLI::App& app, CheckGradients& check) {
  add_word(
      app, "--check", kGradientChecks, [&check](CheckGradients x) { check = x; },
      "hold the gradients against float64 (default auto: up to " + format_flop(kCheckedFlop) + ")");
}

void check_attention_options(const CLI::App& app, const AttentionOptions& attention) {
  check_execution_options(app, attention.options);
  if (!attention.rope) return;
  const RopeScaling scaling = attention.rope->scaling;
  for (const ScalingNumber& number : kScalingNumbers) {
    if (app.count(number.option) > 0 && !number.read_by(scaling)) {
      throw CLI::ValidationError(std::string(number.option) + ": means nothing with --rope-scaling " +
                                 std::string(word_of(scaling, kRopeScalings)));
    }
  }
  if (scaling != RopeScaling::none && app.count("--rope-factor") == 0) {
    throw CLI::ValidationError("--rope-scaling " + std::string(word_of(scaling, kRopeScalings)) +
                               ": needs --rope-factor");
  }
}

}  // namespace moba::cli
