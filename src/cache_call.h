// The contract of the cache: one checked call of append or decode, and what every backend has for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "call.h"
#include "moba/cache.h"
#include "plan_impl.h"

namespace moba {

struct CacheCall;

// The steps of a cache, beside those of call.h.
struct CacheSteps {
  // Writes the new tokens k, v [Tnew, Hk, d] (rotated already) and the centroids of the blocks that they fill.
  void (*append)(const CacheCall& call, const ConstTensor& k, const ConstTensor& v);
  // Attention of q [Tnew, Hq, d] (rotated already).
  void (*decode)(const CacheCall& call, const ConstTensor& q, const DecodeOutputs& outputs);
  // What decode takes of CacheCall::memory.
  std::size_t (*decode_bytes)(const CachePlan::Impl& plan);
};
namespace reference {
extern const CacheSteps kCacheSteps;
}  // namespace reference
namespace cpu {
extern const CacheSteps kCacheSteps;
}  // namespace cpu

struct CachePlan::Impl {
  CacheProblem problem;  // with every default filled in
  Plan plan;             // of one sequence: max_new_tokens queries over max_length keys
  const CacheSteps* steps;
  std::int64_t max_blocks = 0;  // closed ones, of the longest sequence

  // Workspace, each piece at a multiple of kAlignment: scratch of the plan's steps, q or k rotated, what decode takes.
  std::size_t scratch_bytes = 0, rotated_bytes = 0, decode_bytes = 0;
};

// One sequence of the batch. Its last q_len tokens are new: query i sits at position length - q_len + i.
struct CachedSequence {
  std::int64_t row = 0;                 // of the centroids
  std::int64_t q_begin = 0, q_len = 0;  // among the new tokens
  std::int64_t length = 0;              // with the new tokens
  const std::int32_t* pages = nullptr;  // ceil(length / page size) of them

  std::int64_t first_position() const { return length - q_len; }
};

// What the steps take. Everything in it has been checked.
struct CacheCall {
  const CachePlan::Impl& plan;
  Tensor k, v;       // [pages, page size, Hk, d]; contiguous: a page is the place of a sequence
  Tensor centroids;  // [batch, blocks, Hk, d]
  std::vector<CachedSequence> sequences;
  std::vector<std::int32_t> places;  // contiguous: the page of each sequence, which is its number
  Workspace scratch, memory;
};

// Token `token` of a sequence in one of the tensors of the cache, in elements, head 0.
inline std::int64_t token_offset(const ConstTensor& x, const CachedSequence& s, std::int64_t token) {
  const std::int64_t size = x.shape[1];
  return s.pages[token / size] * x.stride[0] + token % size * x.stride[1];
}

// The view moved by so many elements.
inline ConstTensor moved(ConstTensor x, std::int64_t elements) {
  x.data = static_cast<const std::byte*>(x.data) + elements * static_cast<std::int64_t>(size_in_bytes(x.dtype));
  return x;
}
inline Tensor moved(Tensor x, std::int64_t elements) {
  x.data = static_cast<std::byte*>(x.data) + elements * static_cast<std::int64_t>(size_in_bytes(x.dtype));
  return x;
}

// The view without its first dimension, at `index` of it.
template <class AnyTensor>
AnyTensor at_row(AnyTensor x, std::int64_t index) {
  if (index != 0) x = moved(x, index * x.stride[0]);
  for (int i = 1; i < x.rank; ++i) x.shape[i - 1] = x.shape[i], x.stride[i - 1] = x.stride[i];
  --x.rank;
  return x;
}

// One sequence of a call of decode, in the form that the steps of call.h take. k and v are its first page's, with the
// pages beside them.
struct SequenceCall {
  Plan::Impl shape;
  Call call;
  ConstTensor centroids;
  Selection selection;  // in the memory of the call; ids in the caller's where they are asked for
  Outputs outputs;

  SequenceCall(const CacheCall& whole, const CachedSequence& s, const ConstTensor& q, const DecodeOutputs& to);
  SequenceCall(const SequenceCall&) = delete;  // call refers to shape
  SequenceCall& operator=(const SequenceCall&) = delete;

  static std::size_t bytes(const CachePlan::Impl& plan);  // of the selection
};

// Fills everything that both backends share of a Plan::Impl for `tokens` new tokens.
Plan::Impl shape_of(const CachePlan::Impl& plan, std::int64_t tokens);

}  // namespace moba
