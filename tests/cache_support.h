// A cache of the tests: its memory in each of its forms, and prompts that are fed to it piece by piece.
#pragma once

#include "support.h"

namespace moba::test {

enum class CacheForm { contiguous, block_table, csr };

// A sequence of a prompt is fed by as many tokens a step as these say, again and again.
using Steps = std::vector<std::vector<std::int64_t>>;  // [step][sequence]: new tokens
Steps whole(const std::vector<std::int64_t>& lengths);
Steps by_tokens(const std::vector<std::int64_t>& lengths, std::int64_t tokens = 1);
Steps by_random_chunks(const std::vector<std::int64_t>& lengths, std::int64_t most, std::uint64_t seed);

struct CacheCase {
  CacheForm form = CacheForm::contiguous;
  std::int64_t page_size = 16;
  bool heads_first = false;  // k and v as [pages, Hk, page size, d] in memory, the two of a page side by side
};

// Memory of a cache for sequences of these final lengths; pages in a shuffled order. All bytes are 0xff at first: NaN.
class CacheMemory {
 public:
  CacheMemory(const Case& c, const CacheCase& how);

  // The lengths and tables after so many more tokens.
  void advance(const std::vector<std::int64_t>& new_tokens);
  Cache cache();
  // The bits of centroid `block` of a sequence and key head.
  std::vector<std::uint32_t> centroid(std::int64_t s, std::int64_t block, std::int64_t head) const;

  std::vector<std::int32_t> lengths, table, indptr, indices, last_page_len;
  std::int64_t max_pages = 0, pages = 0, blocks = 0;

 private:
  Case case_;
  CacheCase how_;
  std::vector<std::int32_t> order_;  // page of (sequence, index), shuffled: [batch][max_pages]
  std::vector<std::byte> kv_, centroids_;
};

// What came out for each token of the prompts, in the shapes of one prefill.
struct Fed {
  Array out, lse, ids;
};

CacheProblem cache_problem(const Case& c, const Steps& steps);

// Appends and decodes the case's q, k, v step by step, in a workspace of exactly the plan's size.
Fed feed(const Case& c, const Data& data, const Steps& steps, const CacheCase& how, const Options& options,
         CacheMemory* memory = nullptr);

}  // namespace moba::test
