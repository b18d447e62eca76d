#include "attention_file.h"

#include <algorithm>
#include <optional>

#include "memory_use.h"
#include "moba/error.h"
#include "safetensors.h"
#include "views.h"

namespace moba::cli {
namespace {

std::optional<DType> dtype_of(const std::string& text) {
  if (text == "F32") return DType::f32;
  if (text == "F16") return DType::f16;
  if (text == "BF16") return DType::bf16;
  if (text == "I32") return DType::i32;
  return std::nullopt;
}

// Reads tensor `tensor` of the file into `memory`; only views of rank 1 and 3 are asked for here.
ConstTensor load(const SafetensorsReader& file, const FileTensor& tensor, Buffer& memory) {
  memory = file.read(tensor);
  const auto& shape = tensor.shape;
  const DType dtype = *dtype_of(tensor.dtype);
  if (shape.size() == 1) return {memory.data(), dtype, {shape[0]}};
  return {memory.data(), dtype, {shape[0], shape[1], shape[2]}};
}

[[noreturn]] void refuse(const SafetensorsReader& file, const std::string& fault) {
  throw Error(file.path() + ": " + fault);
}

ConstTensor load_rows(const SafetensorsReader& file, const char* name, Buffer& memory) {
  const FileTensor* tensor = file.find(name);
  if (tensor == nullptr) refuse(file, std::string(name) + ": the file has no such tensor; q, k and v are needed");
  const std::optional<DType> dtype = dtype_of(tensor->dtype);
  if (tensor->shape.size() != 3) {
    refuse(file, std::string(name) + ": is " + describe(*tensor) + "; three dimensions are wanted: [tokens, heads, d]");
  }
  if (!dtype || *dtype == DType::i32) {
    refuse(file, std::string(name) + ": dtype is " + tensor->dtype + "; allowed: F32, F16, BF16");
  }
  return load(file, *tensor, memory);
}

ConstTensor load_offsets(const SafetensorsReader& file, const FileTensor& tensor, Buffer& memory) {
  if (tensor.dtype != "I32" || tensor.shape.size() != 1 || tensor.shape[0] < 1) {
    refuse(file, tensor.name + ": is " + describe(tensor) + "; I32 [sequences + 1] is wanted");
  }
  return load(file, tensor, memory);
}

void load_sequences(const SafetensorsReader& file, AttentionFile& result) {
  const FileTensor* both = file.find("cu_seqlens");
  const FileTensor* of_q = file.find("cu_seqlens_q");
  const FileTensor* of_k = file.find("cu_seqlens_k");
  if (both != nullptr && (of_q != nullptr || of_k != nullptr)) {
    refuse(file, "cu_seqlens: is there beside cu_seqlens_q or cu_seqlens_k; one or the other is wanted");
  }
  if ((of_q == nullptr) != (of_k == nullptr)) {
    const std::string missing = of_q == nullptr ? "cu_seqlens_q" : "cu_seqlens_k";
    refuse(file, missing + ": is missing; the other of the two is there");
  }
  if (both != nullptr) of_q = of_k = both;
  if (of_q == nullptr) return;
  result.inputs.cu_seqlens_q = load_offsets(file, *of_q, result.cu_seqlens_q);
  result.inputs.cu_seqlens_k = load_offsets(file, *of_k, result.cu_seqlens_k);
  if (of_q->shape[0] != of_k->shape[0]) {
    refuse(file, "cu_seqlens_k: is " + describe(*of_k) + ", cu_seqlens_q " + describe(*of_q) +
                     "; they must have as many entries");
  }
}

std::vector<std::int64_t> starts(const ConstTensor& cu_seqlens, std::int64_t total) {
  if (!cu_seqlens.given()) return {0, total};
  const auto* begin = static_cast<const std::int32_t*>(cu_seqlens.data);
  return {begin, begin + cu_seqlens.shape[0]};
}

// The longest sequence, so that the plan asks for no more memory than needed; 0 (meaning the total) where the offsets
// are not what they should be: the library then says what is wrong.
std::int64_t longest(const std::vector<std::int64_t>& starts, std::int64_t total) {
  if (starts.front() != 0 || starts.back() != total || !std::is_sorted(starts.begin(), starts.end())) return 0;
  std::int64_t length = 0;
  for (std::size_t i = 1; i < starts.size(); ++i) length = std::max(length, starts[i] - starts[i - 1]);
  return length;
}

}  // namespace

Problem AttentionFile::problem(const AttentionOptions& attention) const {
  Problem problem;
  problem.dtype = inputs.q.dtype;
  problem.q_heads = inputs.q.shape[1];
  problem.kv_heads = inputs.k.shape[1];
  problem.head_dim = inputs.q.shape[2];
  problem.batch = static_cast<std::int64_t>(starts_q.size()) - 1;
  problem.total_q = inputs.q.shape[0];
  problem.total_k = inputs.k.shape[0];
  problem.max_seqlen_q = longest(starts_q, problem.total_q);
  problem.max_seqlen_k = longest(starts_k, problem.total_k);
  problem.config = attention.config;
  problem.rope = attention.rope;
  return problem;
}

std::string AttentionFile::describe() const {
  std::string text = "q " + moba::describe(inputs.q) + ", k and v " + moba::describe(inputs.k);
  if (inputs.cu_seqlens_q.given()) text += ", " + std::to_string(starts_q.size() - 1) + " sequences";
  return text;
}

void AttentionFile::check_sequence(std::int64_t sequence) const {
  const std::size_t count = starts_q.size() - 1;
  if (sequence >= 0 && static_cast<std::size_t>(sequence) < count) return;
  throw Error("--sequence: is " + std::to_string(sequence) + "; the file holds " + std::to_string(count) +
              " sequences, numbered from 0");
}

Inputs AttentionFile::sequence(std::int64_t sequence) const {
  check_sequence(sequence);
  const auto s = static_cast<std::size_t>(sequence);
  const std::int64_t q_len = starts_q[s + 1] - starts_q[s], k_len = starts_k[s + 1] - starts_k[s];
  if (inputs.v.shape[0] != inputs.k.shape[0]) {
    throw Error("v: is " + moba::describe(inputs.v) + "; allowed: as many tokens as k, " + moba::describe(inputs.k));
  }
  Inputs one;
  one.q = rows_of(inputs.q, starts_q[s], q_len);
  one.k = rows_of(inputs.k, starts_k[s], k_len);
  one.v = rows_of(inputs.v, starts_k[s], k_len);
  return one;
}

AttentionFile read_attention_file(const std::string& path) {
  const SafetensorsReader file(path);
  AttentionFile result;
  double bytes = 0;
  for (const char* name : {"q", "k", "v"}) {
    if (const FileTensor* tensor = file.find(name)) bytes += static_cast<double>(tensor->end - tensor->begin);
  }
  require_memory(bytes);
  result.inputs.q = load_rows(file, "q", result.q);
  result.inputs.k = load_rows(file, "k", result.k);
  result.inputs.v = load_rows(file, "v", result.v);
  load_sequences(file, result);
  result.starts_q = starts(result.inputs.cu_seqlens_q, result.inputs.q.shape[0]);
  result.starts_k = starts(result.inputs.cu_seqlens_k, result.inputs.k.shape[0]);
  return result;
}

ConstTensor read_dout(const std::string& path, Buffer& memory) {
  const SafetensorsReader file(path);
  const FileTensor* tensor = file.find("dout");
  if (tensor == nullptr) return {};
  const FileTensor& q = *file.find("q");
  if (tensor->dtype != q.dtype || tensor->shape != q.shape) {
    refuse(file, "dout: is " + describe(*tensor) + "; q's " + describe(q) + " is wanted");
  }
  return load(file, *tensor, memory);
}

}  // namespace moba::cli
