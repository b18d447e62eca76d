// Every refusal of append and decode, in the words of checks.h.
#pragma once

#include "cache_call.h"
#include "checks.h"

namespace moba {

// The new tokens of a call: how many there are in all, and the sequences that they belong to.
struct NewTokens {
  std::int64_t total = 0;
  ConstTensor cu_seqlens;
};

// Checks the cache against the plan and the new tokens, and makes the call of it; `writes`: append, else decode.
CacheCall checked_cache_call(const CachePlan::Impl& plan, const NewTokens& tokens, const Cache& cache, bool writes);

// The memory that a call writes or reads of the cache, by name.
void add_views(const Cache& cache, std::vector<Region>& regions);
void add_tables(const Cache& cache, std::vector<Region>& regions);
// k and v may lie between each other, but share no element.
void check_apart(const Tensor& k, const Tensor& v);

}  // namespace moba
