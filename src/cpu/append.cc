// append: new keys and values to their places in the cache, and the centroids of the blocks that they fill.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cache_call.h"
#include "cpu/cache.h"
#include "cpu/workers.h"
#include "parallel.h"

namespace moba::cpu {

namespace {

constexpr std::int64_t kTokens = 256;  // of one task

// A block of a sequence that this call fills.
struct Filled {
  const CachedSequence* sequence;
  std::int64_t block;
};

std::vector<Filled> filled_blocks(const CacheCall& call) {
  const std::int64_t block_size = call.plan.problem.config.block_size;
  std::vector<Filled> all;
  for (const CachedSequence& s : call.sequences) {
    for (std::int64_t b = s.first_position() / block_size; b < s.length / block_size; ++b) all.push_back({&s, b});
  }
  return all;
}

// All heads of one token.
void write_token(const ConstTensor& from, std::int64_t i, const Tensor& cache, const CachedSequence& s) {
  const std::size_t row = static_cast<std::size_t>(cache.shape[3]) * size_in_bytes(cache.dtype);
  const Tensor to = moved(cache, token_offset(cache, s, s.first_position() + i - s.q_begin));
  for (std::int64_t head = 0; head < cache.shape[2]; ++head) {
    std::memcpy(moved(to, head * cache.stride[2]).data, head_row(from, i, head), row);
  }
}

}  // namespace

void append(const CacheCall& call, const ConstTensor& k, const ConstTensor& v) {
  const Plan::Impl& plan = call.plan.plan.impl();
  const std::int64_t tokens = k.shape[0], heads = plan.problem.kv_heads, block_size = plan.problem.config.block_size;
  parallel_for(plan.threads, ceil_div(tokens, kTokens), [&](std::int64_t task, int) {
    const std::int64_t begin = task * kTokens, end = std::min(tokens, begin + kTokens);
    for_each_overlap(call.sequences, &CachedSequence::q_begin, &CachedSequence::q_len, begin, end,
                     [&](const CachedSequence& s, std::int64_t first, std::int64_t last) {
                       for (std::int64_t i = first; i < last; ++i) write_token(k, i, call.k, s);
                       for (std::int64_t i = first; i < last; ++i) write_token(v, i, call.v, s);
                     });
  });
  const std::vector<Filled> filled = filled_blocks(call);
  const ConstTensor page = at_row(ConstTensor(call.k), 0);
  parallel_for(plan.threads, std::ssize(filled) * heads, [&](std::int64_t task, int) {
    const auto& [s, block] = filled[static_cast<std::size_t>(task / heads)];
    const Tensor row = at_row(moved(call.centroids, block * call.centroids.stride[1]), s->row);
    pool_block(plan, page, {s->pages, call.k.shape[1], call.k.stride[0]}, task % heads, block * block_size, block_size,
               head_row(row, 0, task % heads));
  });
}

const CacheSteps kCacheSteps = {append, decode, decode_bytes};

}  // namespace moba::cpu
