#include "cache_support.h"

#include <algorithm>
#include <numeric>

namespace moba::test {

namespace {

std::size_t element(const Case& c) { return size_in_bytes(c.dtype); }

// Tokens of each sequence so far, and the first token of each sequence in the packed prompt.
std::vector<std::int64_t> starts_of(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> starts(lengths.size() + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), starts.begin() + 1);
  return starts;
}

// The new tokens of one step, copied from the prompt's.
Array taken(const Array& from, const std::vector<std::int64_t>& tokens) {
  Array to(from.dtype(), {std::ssize(tokens), from.dim(1), from.dim(2)});
  for (std::int64_t i = 0; i < std::ssize(tokens); ++i) {
    for (std::int64_t h = 0; h < from.dim(1); ++h) {
      for (std::int64_t d = 0; d < from.dim(2); ++d)
        to.set(i, h, d, from.get(tokens[static_cast<std::size_t>(i)], h, d));
    }
  }
  return to;
}

}  // namespace

Steps whole(const std::vector<std::int64_t>& lengths) { return {lengths}; }

Steps by_tokens(const std::vector<std::int64_t>& lengths, std::int64_t tokens) {
  Steps steps;
  std::vector<std::int64_t> left = lengths;
  while (std::ranges::any_of(left, [](std::int64_t n) { return n > 0; })) {
    std::vector<std::int64_t> step;
    for (std::int64_t& n : left) {
      step.push_back(std::min(n, tokens));
      n -= step.back();
    }
    steps.push_back(step);
  }
  return steps;
}

Steps by_random_chunks(const std::vector<std::int64_t>& lengths, std::int64_t most, std::uint64_t seed) {
  Random random(seed);
  Steps steps;
  std::vector<std::int64_t> left = lengths;
  while (std::ranges::any_of(left, [](std::int64_t n) { return n > 0; })) {
    std::vector<std::int64_t> step;
    for (std::int64_t& n : left) {
      step.push_back(random.one_in(4) ? std::min<std::int64_t>(n, 1) : std::min(n, random.integer(0, most)));
      n -= step.back();
    }
    steps.push_back(step);
  }
  return steps;
}

CacheMemory::CacheMemory(const Case& c, const CacheCase& how) : lengths(c.k_lengths.size(), 0), case_(c), how_(how) {
  const std::int64_t longest = c.k_lengths.empty() ? 0 : std::ranges::max(c.k_lengths), batch = std::ssize(c.k_lengths);
  if (how.form == CacheForm::contiguous) {
    how_.page_size = longest + 3;
    pages = batch;
  } else {
    max_pages = (longest + how.page_size - 1) / how.page_size + 1;
    pages = batch * max_pages + 2;
    order_.resize(static_cast<std::size_t>(pages));
    std::iota(order_.begin(), order_.end(), 0);
    Random random(c.seed + 77);
    for (std::size_t i = order_.size(); i > 1; --i) {
      std::swap(order_[i - 1], order_[static_cast<std::size_t>(random.integer(0, static_cast<std::int64_t>(i) - 1))]);
    }
  }
  blocks = longest / c.config.block_size + 1;
  const std::int64_t page = how_.page_size * c.kv_heads * c.head_dim;
  kv_.assign(static_cast<std::size_t>(2 * pages * page) * element(c), std::byte{0xff});
  centroids_.assign(static_cast<std::size_t>(batch * blocks * c.kv_heads * c.head_dim) * element(c), std::byte{0xff});
  advance(std::vector<std::int64_t>(c.k_lengths.size(), 0));
}

void CacheMemory::advance(const std::vector<std::int64_t>& new_tokens) {
  table.clear();
  indices.clear();
  last_page_len.clear();
  indptr = {0};
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    lengths[s] += static_cast<std::int32_t>(new_tokens[s]);
    if (how_.form == CacheForm::contiguous) continue;
    const std::int64_t used = (lengths[s] + how_.page_size - 1) / how_.page_size;
    for (std::int64_t i = 0; i < max_pages; ++i) {
      const std::int32_t page_id = order_[s * static_cast<std::size_t>(max_pages) + static_cast<std::size_t>(i)];
      table.push_back(i < used ? page_id : -1);  // what is not read may be anything
      if (i < used) indices.push_back(page_id);
    }
    indptr.push_back(static_cast<std::int32_t>(indices.size()));
    last_page_len.push_back(static_cast<std::int32_t>(used == 0 ? -5 : lengths[s] - (used - 1) * how_.page_size));
  }
}

Cache CacheMemory::cache() {
  const std::int64_t batch = std::ssize(lengths), heads = case_.kv_heads, d = case_.head_dim, size = how_.page_size;
  const std::int64_t page = size * heads * d;
  Cache cache;
  cache.k = Tensor(kv_.data(), case_.dtype, {pages, size, heads, d});
  cache.v = Tensor(kv_.data() + static_cast<std::size_t>(pages * page) * element(case_), case_.dtype,
                   {pages, size, heads, d});
  if (how_.heads_first) {
    cache.v.data = kv_.data() + static_cast<std::size_t>(page) * element(case_);
    cache.k.stride = cache.v.stride = {2 * page, d, size * d, 1};
  }
  cache.centroids = Tensor(centroids_.data(), case_.dtype, {batch, blocks, heads, d});
  if (how_.form == CacheForm::csr) {
    cache.indptr = ConstTensor(indptr.data(), DType::i32, {batch + 1});
    cache.indices = ConstTensor(indices.data(), DType::i32, {std::ssize(indices)});
    cache.last_page_len = ConstTensor(last_page_len.data(), DType::i32, {batch});
    return cache;
  }
  cache.lengths = ConstTensor(lengths.data(), DType::i32, {batch});
  if (how_.form == CacheForm::block_table) {
    cache.block_table = ConstTensor(table.data(), DType::i32, {batch, max_pages});
  }
  return cache;
}

std::vector<std::uint32_t> CacheMemory::centroid(std::int64_t s, std::int64_t block, std::int64_t head) const {
  std::vector<std::uint32_t> bits;
  const std::int64_t first = ((s * blocks + block) * case_.kv_heads + head) * case_.head_dim;
  for (std::int64_t i = 0; i < case_.head_dim; ++i) {
    bits.push_back(std::bit_cast<std::uint32_t>(load_float(centroids_.data(), case_.dtype, first + i)));
  }
  return bits;
}

CacheProblem cache_problem(const Case& c, const Steps& steps) {
  CacheProblem p;
  p.dtype = c.dtype;
  p.q_heads = c.q_heads;
  p.kv_heads = c.kv_heads;
  p.head_dim = c.head_dim;
  p.max_batch = std::max<std::int64_t>(1, std::ssize(c.k_lengths));
  for (const auto& step : steps) {
    p.max_new_tokens = std::max(p.max_new_tokens, std::accumulate(step.begin(), step.end(), std::int64_t{0}));
  }
  p.max_length = std::max<std::int64_t>(1, c.k_lengths.empty() ? 0 : std::ranges::max(c.k_lengths));
  p.config = c.config;
  p.rope = c.rope;
  return p;
}

Fed feed(const Case& c, const Data& data, const Steps& steps, const CacheCase& how, const Options& options,
         CacheMemory* given) {
  const CachePlan plan(cache_problem(c, steps), options);
  std::vector<std::byte> workspace(plan.workspace_bytes());
  CacheMemory own(c, how);
  CacheMemory& memory = given != nullptr ? *given : own;
  Fed fed{Array(c.dtype, {c.total_q(), c.q_heads, c.head_dim}), Array(DType::f32, {c.q_heads, c.total_q()}),
          Array(DType::i32, {c.total_q(), c.q_heads, plan.slots()})};
  const std::vector<std::int64_t> starts = starts_of(c.k_lengths);
  for (const auto& step : steps) {
    std::vector<std::int64_t> tokens;
    for (std::size_t s = 0; s < step.size(); ++s) {
      for (std::int64_t i = 0; i < step[s]; ++i) tokens.push_back(starts[s] + memory.lengths[s] + i);
    }
    memory.advance(step);
    const Array q = taken(data.q, tokens), k = taken(data.k, tokens), v = taken(data.v, tokens),
                cu = test::starts(step);
    const std::int64_t n = std::ssize(tokens);
    Array out(c.dtype, {n, c.q_heads, c.head_dim}, c.outputs), lse(DType::f32, {c.q_heads, n}, c.outputs);
    Array ids(DType::i32, {n, c.q_heads, plan.slots()}, c.outputs);
    const Cache cache = memory.cache();
    append(plan, k.tensor(), v.tensor(), cu.tensor(), cache, workspace);
    decode(plan, q.tensor(), cu.tensor(), cache, {out.tensor(), lse.tensor(), ids.tensor()}, workspace);
    EXPECT_TRUE(out.surroundings_untouched() && lse.surroundings_untouched() && ids.surroundings_untouched());
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t token = tokens[static_cast<std::size_t>(i)];
      for (std::int64_t h = 0; h < c.q_heads; ++h) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) fed.out.set(token, h, d, out.get(i, h, d));
        fed.lse.set(h, token, 0, lse.get(h, i));
        for (std::int64_t slot = 0; slot < plan.slots(); ++slot) {
          fed.ids.as<std::int32_t>(token, h, slot) = ids.as<std::int32_t>(i, h, slot);
        }
      }
    }
  }
  return fed;
}

}  // namespace moba::test
