// append and decode over a cache: the keys and values of a sequence are gathered, then it is a call like any other.
#include <cstring>

#include "cache_call.h"
#include "reference/access.h"

namespace moba::reference {
namespace {

// Row `token` of one head of the cache, d elements.
std::byte* cached(const Tensor& x, const CachedSequence& s, std::int64_t token, std::int64_t head) {
  return static_cast<std::byte*>(moved(x, token_offset(x, s, token) + head * x.stride[2]).data);
}

// All the tokens of a sequence, [length, Hk, d].
std::vector<std::byte> gathered(const Tensor& x, const CachedSequence& s) {
  const std::size_t row = static_cast<std::size_t>(x.shape[3]) * size_in_bytes(x.dtype);
  std::vector<std::byte> tokens(row * static_cast<std::size_t>(s.length * x.shape[2]));
  std::byte* to = tokens.data();
  for (std::int64_t token = 0; token < s.length; ++token) {
    for (std::int64_t head = 0; head < x.shape[2]; ++head, to += row) std::memcpy(to, cached(x, s, token, head), row);
  }
  return tokens;
}

void write(const ConstTensor& from, const Tensor& x, const CachedSequence& s) {
  const std::size_t row = static_cast<std::size_t>(x.shape[3]) * size_in_bytes(x.dtype);
  for (std::int64_t i = 0; i < s.q_len; ++i) {
    for (std::int64_t head = 0; head < x.shape[2]; ++head) {
      std::memcpy(cached(x, s, s.first_position() + i, head), moved(from, at(from, s.q_begin + i, head)).data, row);
    }
  }
}

void append(const CacheCall& call, const ConstTensor& k, const ConstTensor& v) {
  const std::int64_t block_size = call.plan.problem.config.block_size;
  for (const CachedSequence& s : call.sequences) {
    write(k, call.k, s);
    write(v, call.v, s);
    // The blocks that the new tokens fill: pool of the keys that they hold.
    const std::int64_t first = s.first_position() / block_size, closed = s.length / block_size - first;
    if (closed <= 0) continue;
    CachedSequence filled = s;
    filled.length = (first + closed) * block_size;
    const std::vector<std::byte> keys = gathered(call.k, filled);
    const Plan::Impl shape = shape_of(call.plan, 0);
    Call pooled{shape, {}, {}, {}, {}, {}, {}, {}, {}};
    pooled.k = ConstTensor(keys.data(), call.k.dtype, {filled.length, call.k.shape[2], call.k.shape[3]});
    pooled.sequences = {{0, 0, first * block_size, closed * block_size, 0, closed}};
    pool(pooled, at_row(moved(call.centroids, first * call.centroids.stride[1]), s.row));
  }
}

void decode(const CacheCall& call, const ConstTensor& q, const DecodeOutputs& outputs) {
  for (const CachedSequence& s : call.sequences) {
    if (s.q_len == 0) continue;
    SequenceCall one(call, s, q, outputs);
    const std::vector<std::byte> keys = gathered(call.k, s), values = gathered(call.v, s);
    one.call.k = ConstTensor(keys.data(), call.k.dtype, {s.length, call.k.shape[2], call.k.shape[3]});
    one.call.v = ConstTensor(values.data(), call.v.dtype, {s.length, call.v.shape[2], call.v.shape[3]});
    gate(one.call, one.centroids, one.selection);
    index(one.call, one.selection);
    attend(one.call, one.selection, one.outputs);
  }
}

}  // namespace

const CacheSteps kCacheSteps = {append, decode, SequenceCall::bytes};

}  // namespace moba::reference
