#include "problem_text.h"

#include <array>
#include <functional>
#include <limits>
#include <map>
#include <optional>

#include "names.h"
#include "text.h"

namespace moba::cli {
namespace {

constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMostTokens = std::int64_t{1} << 40;  // products with it stay far from overflow
constexpr std::int64_t kMostCount = 1 << 20;

// What the text says; absent: not said.
struct Said {
  std::optional<std::int64_t> tokens, tq, tk, batch, q_heads, kv_heads, d, block, topk, causal, threads, device,
      workspace_limit;
  std::optional<double> scale, rope_base;
  std::optional<DType> dtype;
  std::optional<Backend> backend;
  std::optional<Bf16Products> bf16_products;
  std::optional<std::string> target, kernels;
};

struct Key {
  const char* name;
  const char* meaning;
  std::function<void(Said&, std::string_view name, std::string_view value)> read;
};

auto whole(std::optional<std::int64_t> Said::*field, std::int64_t low, std::int64_t high) {
  return [=](Said& said, std::string_view name, std::string_view value) {
    said.*field = parse_int(name, value, low, high);
  };
}

auto real(std::optional<double> Said::*field) {
  return [=](Said& said, std::string_view name, std::string_view value) { said.*field = parse_real(name, value); };
}

template <class Enum, class Words>
auto word(std::optional<Enum> Said::*field, const Words& words) {
  return [field, &words](Said& said, std::string_view name, std::string_view value) {
    said.*field = parse_word(name, value, words);
  };
}

const std::array<Key, 20>& keys() {
  static const std::array<Key, 20> kKeys{{
      {"tokens", "tokens of each sequence, of queries and of keys", whole(&Said::tokens, 0, kMostTokens)},
      {"tq", "query tokens of each sequence, where they differ (default: tokens)", whole(&Said::tq, 0, kMostTokens)},
      {"tk", "key tokens of each sequence, where they differ (default: tokens)", whole(&Said::tk, 0, kMostTokens)},
      {"batch", "sequences (default 1)", whole(&Said::batch, 0, kMostCount)},
      {"q_heads", "query heads (default 1)", whole(&Said::q_heads, 1, kMostCount)},
      {"kv_heads", "key and value heads (default: q_heads)", whole(&Said::kv_heads, 1, kMostCount)},
      {"d", "head dimension (default 128)", whole(&Said::d, 1, kMostCount)},
      {"block", "keys per block (default 128)", whole(&Said::block, 1, kAny)},
      {"topk", "blocks per query (default 8)", whole(&Said::topk, 1, kAny)},
      {"dtype", "f32, f16 or bf16 (default f32)", word(&Said::dtype, kDTypes)},
      {"causal", "1: causal mask, 0: none (default 1)", whole(&Said::causal, 0, 1)},
      {"scale", "factor on q . k (default 1 / sqrt(d))", real(&Said::scale)},
      {"rope_base", "rotates q and k with this base (default: no rotation)", real(&Said::rope_base)},
      {"threads", "at most this many threads (default 0: one per core)",
       whole(&Said::threads, 0, std::numeric_limits<int>::max())},
      {"backend", "cpu, reference or cuda (default cpu)", word(&Said::backend, kBackends)},
      {"target", "instruction set, one that moba info lists (default: the best)",
       [](Said& said, std::string_view, std::string_view value) { said.target = std::string(value); }},
      {"bf16_products", "auto, widen or dot (default auto)", word(&Said::bf16_products, kBf16Products)},
      {"device", "cuda: which GPU (default 0)", whole(&Said::device, 0, std::numeric_limits<int>::max())},
      {"kernels", "cuda: sm90 or portable (default: the best for the GPU)",
       [](Said& said, std::string_view name, std::string_view value) {
         said.kernels = std::string(parse_word(name, value, kCudaKernels));
       }},
      {"workspace_limit", "cuda: at most so many bytes of workspace, e.g. 512M (default: see --workspace-limit)",
       [](Said& said, std::string_view name, std::string_view value) {
         said.workspace_limit = parse_bytes(name, value);
       }},
  }};
  return kKeys;
}

const Key& find_key(std::string_view name) {
  std::string allowed;
  for (const Key& key : keys()) {
    if (key.name == name) return key;
    allowed += (allowed.empty() ? "" : ", ") + std::string(key.name);
  }
  throw Error("problem: unknown key '" + printable(name) + "'; allowed: " + allowed);
}

Said read_pairs(std::string_view text) {
  constexpr std::string_view kSeparators = " ,\t\n";
  Said said;
  std::map<std::string_view, bool> seen;
  for (std::size_t at = text.find_first_not_of(kSeparators); at < text.size();) {
    const std::size_t end = std::min(text.find_first_of(kSeparators, at), text.size());
    const std::string_view pair = text.substr(at, end - at);
    const std::size_t equals = pair.find('=');
    if (equals == pair.npos) throw Error("problem: '" + printable(pair) + "' is not a pair key=value");
    const Key& key = find_key(pair.substr(0, equals));
    if (seen[key.name]) throw Error("problem: key " + std::string(key.name) + " is there twice");
    seen[key.name] = true;
    key.read(said, key.name, pair.substr(equals + 1));
    at = text.find_first_not_of(kSeparators, end);
  }
  return said;
}

std::int64_t length(const Said& said, const std::optional<std::int64_t>& own, const char* name) {
  if (own) return *own;
  if (said.tokens) return *said.tokens;
  throw Error("problem: neither tokens nor " + std::string(name) + " is given");
}

// `options` but for what is said.
Options options_of(const Said& said, Options options) {
  options.threads = static_cast<int>(said.threads.value_or(options.threads));
  options.backend = said.backend.value_or(options.backend);
  options.cpu_target = said.target.value_or(options.cpu_target);
  options.bf16_products = said.bf16_products.value_or(options.bf16_products);
  for (const auto& [given, key] : {std::pair{said.device.has_value(), "device"},
                                   {said.kernels.has_value(), "kernels"},
                                   {said.workspace_limit.has_value(), "workspace_limit"}}) {
    if (!given || options.backend == Backend::cuda) continue;
    throw Error("problem: " + std::string(key) + " needs backend=cuda, but it is " + name(options.backend));
  }
  options.cuda_device = static_cast<int>(said.device.value_or(options.cuda_device));
  options.cuda_kernels = said.kernels.value_or(options.cuda_kernels);
  if (said.workspace_limit) options.workspace_limit = static_cast<std::size_t>(*said.workspace_limit);
  return options;
}

}  // namespace

TextProblem parse_problem(std::string_view text, const Options& options) {
  const Said said = read_pairs(text);
  if (said.tokens && said.tq && said.tk) throw Error("problem: tokens, tq and tk are given; tq and tk say it all");
  TextProblem result;
  result.seqlen_q = length(said, said.tq, "tq");
  result.seqlen_k = length(said, said.tk, "tk");

  Problem& problem = result.problem;
  problem.batch = said.batch.value_or(1);
  problem.total_q = problem.batch * result.seqlen_q;
  problem.total_k = problem.batch * result.seqlen_k;
  problem.max_seqlen_q = problem.batch == 0 ? 0 : result.seqlen_q;
  problem.max_seqlen_k = problem.batch == 0 ? 0 : result.seqlen_k;
  problem.q_heads = said.q_heads.value_or(1);
  problem.kv_heads = said.kv_heads.value_or(problem.q_heads);
  problem.head_dim = said.d.value_or(128);
  problem.dtype = said.dtype.value_or(DType::f32);
  problem.config.block_size = said.block.value_or(128);
  problem.config.top_k = said.topk.value_or(8);
  problem.config.causal = said.causal.value_or(1) == 1;
  problem.config.scale = said.scale;
  if (said.rope_base) problem.rope.emplace().base = *said.rope_base;
  result.options = options_of(said, options);
  return result;
}

std::string problem_text_help() {
  std::string text = "A problem is text of key=value pairs, separated by spaces or commas:\n";
  for (const Key& key : keys()) text += format("  %-15s %s\n", key.name, key.meaning);
  return text + "What it says of how to compute goes before the options.\n";
}

std::string describe(const TextProblem& text) {
  const Problem& problem = text.problem;
  std::string line;
  const auto add = [&line](const char* key, std::string_view value) {
    if (!line.empty()) line += ' ';
    line.append(key).append("=").append(value);
  };
  if (text.seqlen_q == text.seqlen_k) {
    add("tokens", std::to_string(text.seqlen_q));
  } else {
    add("tq", std::to_string(text.seqlen_q));
    add("tk", std::to_string(text.seqlen_k));
  }
  add("batch", std::to_string(problem.batch));
  add("q_heads", std::to_string(problem.q_heads));
  add("kv_heads", std::to_string(problem.kv_heads));
  add("d", std::to_string(problem.head_dim));
  add("block", std::to_string(problem.config.block_size));
  add("topk", std::to_string(problem.config.top_k));
  add("dtype", name(problem.dtype));
  add("causal", problem.config.causal ? "1" : "0");
  if (problem.config.scale) add("scale", format("%g", *problem.config.scale));
  if (problem.rope) add("rope_base", format("%g", problem.rope->base));
  return line;
}

std::vector<std::int64_t> start_offsets(std::int64_t batch, std::int64_t length) {
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t i = 0; i < batch; ++i) offsets.push_back(offsets.back() + length);
  return offsets;
}

}  // namespace moba::cli
