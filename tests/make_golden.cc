// Writes tests/golden/*.safetensors: small inputs with the results that docs/spec.md gives for them, from the reference
// backend. tests/golden/README.md says what is in a file. Run it only when the operator is meant to change:
//
//   make_golden DIRECTORY
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moba/moba.h"
#include "numeric.h"
#include "safetensors.h"

namespace moba {
namespace {

struct Case {
  std::string name, about;
  DType dtype = DType::f32;
  std::int64_t q_heads = 4, kv_heads = 2, head_dim = 16;
  std::vector<std::int32_t> q_lengths, k_lengths;  // of the sequences
  Config config;
  std::optional<Rope> rope = std::nullopt;
  std::uint32_t seed = 1;         // of q; k and v have the next two
  std::int64_t key_patterns = 0;  // not 0: block b of the batch's keys repeats block b % key_patterns
};

Config config(std::int64_t block_size, std::int64_t top_k, bool causal = true,
              std::optional<double> scale = std::nullopt) {
  return {.block_size = block_size, .top_k = top_k, .causal = causal, .scale = scale};
}

// 256 tokens of original context make fast, slow and middling pairs appear within the 120 tokens of a case.
Rope scaled_rope(RopeStyle style, std::int64_t rotary_dim, RopeScaling scaling) {
  Rope rope;
  rope.style = style;
  rope.rotary_dim = rotary_dim;
  rope.scaling = scaling;
  rope.factor = 8.0;
  rope.original_max_position = 256.0;
  return rope;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  all.push_back({.name = "causal_gqa_f32",
                 .about = "one sequence with a short last block, two query heads per key head",
                 .q_lengths = {130},
                 .k_lengths = {130},
                 .config = config(16, 3)});
  all.push_back({.name = "causal_gqa_bf16",
                 .about = "bfloat16, three query heads per key head, d not a power of two",
                 .dtype = DType::bf16,
                 .q_heads = 3,
                 .kv_heads = 1,
                 .head_dim = 24,
                 .q_lengths = {100},
                 .k_lengths = {100},
                 .config = config(16, 3)});
  all.push_back({.name = "ties_f32",
                 .about = "blocks with the same keys tie: the more recent one is chosen",
                 .q_lengths = {90},
                 .k_lengths = {90},
                 .config = config(8, 3),
                 .key_patterns = 3});
  all.push_back({.name = "non_causal_f32",
                 .about = "no mask: the best blocks of the whole sequence; a scale of one's own",
                 .q_lengths = {70},
                 .k_lengths = {90},
                 .config = config(16, 2, false, 0.5)});
  all.push_back({.name = "packed_f32",
                 .about = "five sequences: empty, one token, a short last block, whole blocks, one key short",
                 .q_lengths = {0, 1, 37, 32, 15},
                 .k_lengths = {0, 1, 37, 32, 15},
                 .config = config(8, 2)});
  all.push_back(
      {.name = "unequal_lengths_f32",
       .about = "cached keys (5 queries of 70, 1 of 33), queries before the first key (4 of 2), no key at all (3 of 0)",
       .q_lengths = {5, 1, 4, 3},
       .k_lengths = {70, 33, 2, 0},
       .config = config(16, 3)});
  all.push_back({.name = "all_blocks_f16",
                 .about = "float16; k * B covers the sequence: dense attention",
                 .dtype = DType::f16,
                 .q_lengths = {60},
                 .k_lengths = {60},
                 .config = config(16, 4)});
  all.push_back({.name = "rope_half_split_llama3_f32",
                 .about = "half-split rope with llama3 scaling",
                 .q_heads = 2,
                 .kv_heads = 1,
                 .head_dim = 32,
                 .q_lengths = {100},
                 .k_lengths = {120},
                 .config = config(16, 3),
                 .rope = scaled_rope(RopeStyle::half_split, 32, RopeScaling::llama3)});
  all.push_back({.name = "rope_interleaved_llama3_bf16",
                 .about = "interleaved rope of the first 24 dimensions with llama3 scaling, bfloat16",
                 .dtype = DType::bf16,
                 .q_heads = 2,
                 .kv_heads = 1,
                 .head_dim = 32,
                 .q_lengths = {120},
                 .k_lengths = {120},
                 .config = config(16, 3),
                 .rope = scaled_rope(RopeStyle::interleaved, 24, RopeScaling::llama3)});
  all.push_back({.name = "rope_half_split_yarn_f32",
                 .about = "half-split rope of the first 24 dimensions with yarn scaling",
                 .q_heads = 2,
                 .kv_heads = 1,
                 .head_dim = 32,
                 .q_lengths = {60, 40},
                 .k_lengths = {80, 40},
                 .config = config(16, 2),
                 .rope = scaled_rope(RopeStyle::half_split, 24, RopeScaling::yarn)});
  for (std::size_t i = 0; i < all.size(); ++i) all[i].seed = static_cast<std::uint32_t>(3 * i + 1);
  return all;
}

// Element i of the stream `seed`: a multiple of 2^-23 in [-1, 1), from the finaliser of MurmurHash3.
float noise(std::uint32_t seed, std::uint32_t i) {
  std::uint32_t h = i + 0x9e3779b9u * seed;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  h ^= h >> 16;
  return static_cast<float>(h >> 8) * 0x1p-23f - 1.0f;
}

// A contiguous tensor with its memory.
struct Array {
  std::vector<std::byte> memory;
  Tensor tensor;

  Array(DType dtype, std::initializer_list<std::int64_t> shape) : tensor(nullptr, dtype, shape) {
    std::size_t bytes = size_in_bytes(dtype);
    for (const std::int64_t n : shape) bytes *= static_cast<std::size_t>(n);
    memory.resize(bytes + 8);  // a tensor without elements has an address too
    tensor.data = memory.data();
  }
  Array(Array&&) = default;  // the memory stays where it is; a copy's would not
  std::int64_t size() const { return tensor.shape[0] * tensor.stride[0]; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(memory.data());
  }
};

Array tokens(const Case& c, std::int64_t count, std::int64_t heads) { return {c.dtype, {count, heads, c.head_dim}}; }

// amplitude * noise, rounded to the type of the array.
void fill(Array& array, std::uint32_t seed, float amplitude) {
  for (std::int64_t i = 0; i < array.size(); ++i) {
    store_float(array.memory.data(), array.tensor.dtype, i, amplitude * noise(seed, static_cast<std::uint32_t>(i)));
  }
}

void repeat_blocks(Array& k, std::int64_t block_size, std::int64_t patterns) {
  const std::size_t token = static_cast<std::size_t>(k.tensor.stride[0]) * size_in_bytes(k.tensor.dtype);
  for (std::int64_t j = 0; j < k.tensor.shape[0]; ++j) {
    const std::int64_t source = j / block_size % patterns * block_size + j % block_size;
    std::memmove(&k.memory[token * static_cast<std::size_t>(j)], &k.memory[token * static_cast<std::size_t>(source)],
                 token);
  }
}

Array widened(const ConstTensor& x) {
  Array wide(DType::f32, {x.shape[0], x.shape[1], x.shape[2]});
  for (std::int64_t i = 0; i < wide.size(); ++i) wide.as<float>()[i] = load_float(x.data, x.dtype, i);
  return wide;
}

Array starts(const std::vector<std::int32_t>& lengths) {
  Array cu_seqlens(DType::i32, {static_cast<std::int64_t>(lengths.size()) + 1});
  cu_seqlens.as<std::int32_t>()[0] = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    cu_seqlens.as<std::int32_t>()[s + 1] = cu_seqlens.as<std::int32_t>()[s] + lengths[s];
  }
  return cu_seqlens;
}

std::string text(double value) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.17g", value);
  return buffer;
}

std::map<std::string, std::string> metadata(const Case& c, const Problem& p) {
  std::map<std::string, std::string> m{{"about", c.about},
                                       {"seed", std::to_string(c.seed)},
                                       {"block_size", std::to_string(p.config.block_size)},
                                       {"top_k", std::to_string(p.config.top_k)},
                                       {"causal", p.config.causal ? "true" : "false"},
                                       {"scale", text(*p.config.scale)}};
  if (c.key_patterns != 0) m["key_patterns"] = std::to_string(c.key_patterns);
  if (!p.rope) return m;
  const Rope& r = *p.rope;
  m["rope_style"] = r.style == RopeStyle::half_split ? "half-split" : "interleaved";
  m["rope_rotary_dim"] = std::to_string(r.rotary_dim);
  m["rope_base"] = text(r.base);
  m["rope_scaling"] = r.scaling == RopeScaling::yarn ? "yarn" : "llama3";
  m["rope_factor"] = text(r.factor);
  m["rope_original_max_position"] = text(r.original_max_position);
  if (r.scaling == RopeScaling::yarn) {
    m["rope_beta_fast"] = text(r.beta_fast);
    m["rope_beta_slow"] = text(r.beta_slow);
    m["rope_attention_factor"] = text(r.attention_factor.value_or(0.1 * std::log(r.factor) + 1.0));
  } else {
    m["rope_low_freq_factor"] = text(r.low_freq_factor);
    m["rope_high_freq_factor"] = text(r.high_freq_factor);
  }
  return m;
}

// Offsets without the empty lists of blocks that the batch does not have.
Array compact_offsets(const std::int64_t* offsets, std::int64_t kv_heads, std::int64_t blocks,
                      std::int64_t max_blocks) {
  Array compact(DType::i64, {kv_heads * blocks + 1});
  for (std::int64_t h = 0; h < kv_heads; ++h) {
    for (std::int64_t b = 0; b < blocks; ++b) compact.as<std::int64_t>()[h * blocks + b] = offsets[h * max_blocks + b];
  }
  compact.as<std::int64_t>()[kv_heads * blocks] = offsets[kv_heads * max_blocks];
  return compact;
}

void write(const Case& c, const std::string& directory) {
  Array cu_seqlens_q = starts(c.q_lengths), cu_seqlens_k = starts(c.k_lengths);
  const std::int64_t batch = static_cast<std::int64_t>(c.q_lengths.size());
  const std::int64_t total_q = cu_seqlens_q.as<std::int32_t>()[batch], total_k = cu_seqlens_k.as<std::int32_t>()[batch];
  std::int64_t blocks = 0;
  for (const std::int32_t length : c.k_lengths) blocks += (length + c.config.block_size - 1) / c.config.block_size;

  Array q = tokens(c, total_q, c.q_heads), k = tokens(c, total_k, c.kv_heads), v = tokens(c, total_k, c.kv_heads);
  fill(q, c.seed, 4.0f);
  fill(k, c.seed + 1, 1.0f);
  fill(v, c.seed + 2, 1.0f);
  if (c.key_patterns != 0) repeat_blocks(k, c.config.block_size, c.key_patterns);
  std::vector<cli::NamedTensor> tensors{{"q", q.tensor},
                                        {"k", k.tensor},
                                        {"v", v.tensor},
                                        {"cu_seqlens_q", cu_seqlens_q.tensor},
                                        {"cu_seqlens_k", cu_seqlens_k.tensor}};

  Problem problem;
  problem.dtype = c.dtype;
  problem.q_heads = c.q_heads;
  problem.kv_heads = c.kv_heads;
  problem.head_dim = c.head_dim;
  problem.batch = batch;
  problem.total_q = total_q;
  problem.total_k = total_k;
  for (const std::int32_t length : c.q_lengths)
    problem.max_seqlen_q = std::max<std::int64_t>(problem.max_seqlen_q, length);
  for (const std::int32_t length : c.k_lengths)
    problem.max_seqlen_k = std::max<std::int64_t>(problem.max_seqlen_k, length);
  problem.config = c.config;
  problem.rope = c.rope;
  Options reference;
  reference.backend = Backend::reference;
  const Plan plan(problem, reference);
  std::vector<std::byte> workspace(plan.workspace_bytes());

  Inputs inputs{q.tensor, k.tensor, v.tensor, cu_seqlens_q.tensor, cu_seqlens_k.tensor};
  Array q_rotated = tokens(c, total_q, c.q_heads), k_rotated = tokens(c, total_k, c.kv_heads);
  if (c.rope) {
    rope(plan, inputs, q_rotated.tensor, k_rotated.tensor, workspace);
    inputs.q = q_rotated.tensor;
    inputs.k = k_rotated.tensor;
    tensors.push_back({"q_rotated", q_rotated.tensor});
    tensors.push_back({"k_rotated", k_rotated.tensor});
  }

  Array centroids = tokens(c, plan.max_blocks(), c.kv_heads);
  pool(plan, inputs, centroids.tensor, workspace);
  std::vector<std::int64_t> selection_memory(plan.selection_bytes() / 8 + 1);
  const Selection selection = make_selection(plan, std::as_writable_bytes(std::span(selection_memory)));
  gate(plan, inputs, centroids.tensor, selection, workspace);
  index(plan, inputs, selection, workspace);
  centroids.tensor.shape[0] = blocks;
  Array offsets =
      compact_offsets(static_cast<const std::int64_t*>(selection.offsets.data), c.kv_heads, blocks, plan.max_blocks());
  Tensor rows = selection.rows;
  rows.shape[0] = offsets.as<std::int64_t>()[c.kv_heads * blocks];
  tensors.push_back({"centroids", centroids.tensor});
  tensors.push_back({"ids", selection.ids});
  tensors.push_back({"counts", selection.counts});
  tensors.push_back({"offsets", offsets.tensor});
  tensors.push_back({"rows", rows});

  // The same selection over the same numbers as float32, so that out is not rounded to 16 bits.
  problem.dtype = DType::f32;
  const Plan wide_plan(problem, reference);
  const Array wide_q = widened(inputs.q), wide_k = widened(inputs.k), wide_v = widened(inputs.v);
  inputs.q = wide_q.tensor;
  inputs.k = wide_k.tensor;
  inputs.v = wide_v.tensor;
  Array out(DType::f32, {total_q, c.q_heads, c.head_dim}), lse(DType::f32, {c.q_heads, total_q});
  workspace.resize(wide_plan.workspace_bytes());
  attend(wide_plan, inputs, selection, {out.tensor, lse.tensor}, workspace);
  tensors.push_back({"out", out.tensor});
  tensors.push_back({"lse", lse.tensor});

  cli::write_safetensors(directory + "/" + c.name + ".safetensors", tensors, metadata(c, plan.problem()));
}

}  // namespace
}  // namespace moba

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_golden DIRECTORY\n");
    return 2;
  }
  try {
    for (const moba::Case& c : moba::cases()) moba::write(c, argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_golden: %s\n", error.what());
    return 1;
  }
}
