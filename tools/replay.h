// A sequence fed to a KV cache as a server would: some tokens in one call, then one after the other.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "moba/cache.h"
#include "moba/plan.h"

namespace moba::cli {

// A cache for the tokens of a sequence: the keys of a head and a page are one piece of memory.
class ReplayCache {
 public:
  // page_size 0: contiguous; else pages in descending order, with a block table.
  ReplayCache(const CachePlan& plan, std::int64_t page_size);

  // Views of it once it holds so many tokens.
  Cache holding(std::int64_t tokens);

  // Bytes that it takes.
  static double bytes(const CachePlan& plan, std::int64_t page_size);

 private:
  Buffer k_, v_, centroids_, table_;
  std::int32_t length_ = 0;
  Cache cache_;
};

// What came out for each token, [T, Hq, d] and, unless no ids are wanted, [T, Hq, slots].
struct Replayed {
  Replayed(const CachePlan& plan, std::int64_t tokens, bool with_ids);

  Buffer out_memory, ids_memory;
  Tensor out, ids;
};

// Appends and decodes the tokens first ... first + count - 1, `at_once` of them in a call (the last may have fewer).
// Returns the seconds that it took. What the cache holds of them already is written again.
double replay(const CachePlan& plan, const Inputs& inputs, std::int64_t first, std::int64_t count, std::int64_t at_once,
              ReplayCache& cache, const Replayed& to, Workspace workspace);

// Bytes that decode must read of a cache on average, for the tokens from `first` on: the keys and values that a token
// sees of the blocks that any row of a key head chose, each once, and the centroids before its own block, where it has
// to choose among them.
double mean_bytes_read(const CachePlan& plan, const ConstTensor& ids, std::int64_t first);
// The same where every block is chosen.
double mean_bytes_read_dense(const CachePlan& plan, std::int64_t first, std::int64_t count);

}  // namespace moba::cli
