#include "cache_checks.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

#include "refuse.h"

namespace moba {

namespace {

std::string entry(const char* table, std::int64_t i) { return std::string(table) + "[" + std::to_string(i) + "]"; }
std::string entry(const char* table, std::int64_t i, std::int64_t j) {
  return std::string(table) + "[" + std::to_string(i) + ", " + std::to_string(j) + "]";
}

const std::int32_t* numbers(const ConstTensor& table) { return static_cast<const std::int32_t*>(table.data); }

bool paged(const Cache& cache) { return cache.block_table.given() || cache.indptr.given(); }

// How many sequences the tables speak of.
std::int64_t checked_batch(const CachePlan::Impl& plan, const Cache& cache) {
  const Plan::Impl& one = plan.plan.impl();
  const bool csr = cache.indptr.given();
  if (csr && cache.block_table.given()) refuse("cache.indptr", "given", "not given beside cache.block_table");
  if (csr && cache.lengths.given()) {
    refuse("cache.lengths", "given", "not given beside cache.indptr: the lengths follow from last_page_len");
  }
  const ConstTensor& table = csr ? cache.last_page_len : cache.lengths;
  const char* const argument = csr ? "cache.last_page_len" : "cache.lengths";
  check_tensor(one, table, {argument, DType::i32, {-1}});
  const std::int64_t batch = table.shape[0];
  if (batch > plan.problem.max_batch) {
    refuse(argument, describe(table), "up to max_batch (" + std::to_string(plan.problem.max_batch) + ") sequences");
  }
  if (csr) {
    check_tensor(one, cache.indptr, {"cache.indptr", DType::i32, {batch + 1}});
    check_tensor(one, cache.indices, {"cache.indices", DType::i32, {-1}});
  } else if (cache.block_table.given()) {
    check_tensor(one, cache.block_table, {"cache.block_table", DType::i32, {batch, -1}});
  }
  return batch;
}

void check_shapes(const CachePlan::Impl& plan, const Cache& cache, std::int64_t batch) {
  const Plan::Impl& one = plan.plan.impl();
  const CacheProblem& p = plan.problem;
  check_tensor(one, cache.k, {"cache.k", p.dtype, {paged(cache) ? -1 : batch, -1, p.kv_heads, p.head_dim}, true});
  const std::int64_t places = cache.k.shape[0], size = cache.k.shape[1];
  if (paged(cache) && size == 0) refuse("cache.k", describe(cache.k), "pages of 1 token or more");
  check_tensor(one, cache.v, {"cache.v", p.dtype, {places, size, p.kv_heads, p.head_dim}, true});
  check_tensor(one, cache.centroids, {"cache.centroids", p.dtype, {batch, -1, p.kv_heads, p.head_dim}, true});
}

// The lengths and pages of the sequences, from whichever table is given.
class Tables {
 public:
  // No sequence is longer than kMost, so neither need a page be, nor a row of the table; and products fit in 64 bits.
  explicit Tables(const Cache& cache)
      : cache_(cache), places_(cache.k.shape[0]), size_(std::min(cache.k.shape[1], kMost)) {}

  void check_indptr(std::int64_t batch) const {
    if (!cache_.indptr.given()) return;
    const std::int32_t* indptr = numbers(cache_.indptr);
    if (indptr[0] != 0) refuse("cache.indptr[0]", indptr[0], "0");
    for (std::int64_t s = 0; s < batch; ++s) {
      if (indptr[s + 1] < indptr[s]) {
        refuse(entry("cache.indptr", s + 1), indptr[s + 1],
               "no less than the entry before it (" + std::to_string(indptr[s]) + ")");
      }
    }
    if (indptr[batch] > cache_.indices.shape[0]) {
      refuse(entry("cache.indptr", batch), indptr[batch],
             "up to the entries of cache.indices, " + std::to_string(cache_.indices.shape[0]));
    }
  }

  // The table that tells a sequence's length.
  std::string source(std::int64_t s) const {
    return cache_.indptr.given() ? "length of sequence " + std::to_string(s) + " in cache.indptr"
                                 : entry("cache.lengths", s);
  }

  std::int64_t length(std::int64_t s) const {
    if (!cache_.indptr.given()) return numbers(cache_.lengths)[s];
    const std::int32_t* indptr = numbers(cache_.indptr);
    const std::int64_t pages = indptr[s + 1] - indptr[s], last = numbers(cache_.last_page_len)[s];
    if (pages == 0) return 0;
    if (last < 1 || last > size_) {
      refuse(entry("cache.last_page_len", s), last, "1 to the page size, " + std::to_string(size_));
    }
    return (pages - 1) * size_ + last;
  }

  // Tokens that there is a place for, as far as the tables go.
  std::int64_t capacity() const {
    if (cache_.block_table.given()) return std::min(cache_.block_table.shape[1], kMost) * size_;
    return cache_.indptr.given() ? std::numeric_limits<std::int64_t>::max() : size_;
  }

  const std::int32_t* pages(std::int64_t s, const std::vector<std::int32_t>& own) const {
    if (cache_.indptr.given()) return numbers(cache_.indices) + numbers(cache_.indptr)[s];
    if (cache_.block_table.given()) {
      return numbers(cache_.block_table) + (cache_.block_table.shape[0] > 1 ? s * cache_.block_table.stride[0] : 0);
    }
    return own.data() + s;
  }

  std::string page_name(std::int64_t s, std::int64_t i) const {
    return cache_.indptr.given() ? entry("cache.indices", numbers(cache_.indptr)[s] + i)
                                 : entry("cache.block_table", s, i);
  }

  void check_pages(const CachedSequence& s) const {
    for (std::int64_t i = 0; i < ceil_div(s.length, size_); ++i) {
      if (s.pages[i] < 0 || s.pages[i] >= places_) {
        refuse(page_name(s.row, i), s.pages[i], "pages of cache.k, 0 to " + std::to_string(places_ - 1));
      }
    }
  }

  // A page that is written to belongs to one place of one sequence.
  void check_written(const std::vector<CachedSequence>& sequences) const {
    std::vector<bool> written(static_cast<std::size_t>(places_));
    const auto first_written = [&](const CachedSequence& s) {
      return s.q_len == 0 ? ceil_div(s.length, size_) : s.first_position() / size_;
    };
    const auto refuse_page = [&](const CachedSequence& s, std::int64_t i) {
      refuse(page_name(s.row, i), "page " + std::to_string(s.pages[i]) + ", which is used twice",
             "pages of their own for new tokens");
    };
    for (const CachedSequence& s : sequences) {
      for (std::int64_t i = first_written(s); i < ceil_div(s.length, size_); ++i) {
        if (written[s.pages[i]]) refuse_page(s, i);
        written[s.pages[i]] = true;
      }
    }
    for (const CachedSequence& s : sequences) {
      for (std::int64_t i = 0; i < first_written(s); ++i) {
        if (written[s.pages[i]]) refuse_page(s, i);
      }
    }
  }

 private:
  static constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();

  const Cache& cache_;
  const std::int64_t places_, size_;
};

void check_length(const CachePlan::Impl& plan, const Tables& tables, const Cache& cache, std::int64_t s,
                  std::int64_t length, std::int64_t new_tokens) {
  const auto refuse_length = [&](const std::string& allowed) { refuse(tables.source(s), length, allowed); };
  if (length < 0) refuse_length("0 or more");
  if (length < new_tokens) {
    refuse_length("at least the new tokens of the sequence in cu_seqlens (" + std::to_string(new_tokens) +
                  "), which it counts");
  }
  if (length > plan.problem.max_length) refuse_length("up to max_length, " + std::to_string(plan.problem.max_length));
  if (length > tables.capacity()) {
    refuse_length("up to what the cache has places for, " + std::to_string(tables.capacity()));
  }
  const std::int64_t blocks = length / plan.problem.config.block_size;
  if (blocks > cache.centroids.shape[1]) {
    refuse("cache.centroids", describe(cache.centroids),
           "at least the " + std::to_string(blocks) + " blocks that sequence " + std::to_string(s) + " fills");
  }
}

std::vector<std::int64_t> checked_starts(const CachePlan::Impl& plan, const NewTokens& tokens, std::int64_t batch) {
  std::vector<std::int64_t> starts{0, tokens.total};
  if (tokens.cu_seqlens.given()) {
    check_tensor(plan.plan.impl(), tokens.cu_seqlens, {"cu_seqlens", DType::i32, {batch + 1}});
    starts.assign(numbers(tokens.cu_seqlens), numbers(tokens.cu_seqlens) + batch + 1);
  } else if (batch != 1) {
    refuse("cu_seqlens", "not given", "i32 [" + std::to_string(batch + 1) + "], unless there is one sequence");
  }
  check_cu_seqlens("cu_seqlens", starts, batch, tokens.total, tokens.total);
  return starts;
}

}  // namespace

CacheCall checked_cache_call(const CachePlan::Impl& plan, const NewTokens& tokens, const Cache& cache, bool writes) {
  if (tokens.total > plan.problem.max_new_tokens) {
    refuse("new tokens", tokens.total, "up to max_new_tokens, " + std::to_string(plan.problem.max_new_tokens));
  }
  const std::int64_t batch = checked_batch(plan, cache);
  check_shapes(plan, cache, batch);
  const std::vector<std::int64_t> starts = checked_starts(plan, tokens, batch);
  CacheCall call{plan, cache.k, cache.v, cache.centroids, {}, {}, {}, {}};
  for (std::int64_t s = 0; !paged(cache) && s < batch; ++s) call.places.push_back(static_cast<std::int32_t>(s));
  const Tables tables(cache);
  tables.check_indptr(batch);
  for (std::int64_t s = 0; s < batch; ++s) {
    const std::int64_t length = tables.length(s), new_tokens = starts[s + 1] - starts[s];
    check_length(plan, tables, cache, s, length, new_tokens);
    call.sequences.push_back({s, starts[s], new_tokens, length, tables.pages(s, call.places)});
    tables.check_pages(call.sequences.back());
  }
  if (writes && paged(cache)) tables.check_written(call.sequences);
  return call;
}

void add_views(const Cache& cache, std::vector<Region>& regions) {
  regions.emplace_back("cache.k", cache.k);
  regions.emplace_back("cache.v", cache.v);
  regions.emplace_back("cache.centroids", cache.centroids);
}

void add_tables(const Cache& cache, std::vector<Region>& regions) {
  regions.emplace_back("cache.lengths", cache.lengths);
  regions.emplace_back("cache.block_table", cache.block_table);
  regions.emplace_back("cache.indptr", cache.indptr);
  regions.emplace_back("cache.indices", cache.indices);
  regions.emplace_back("cache.last_page_len", cache.last_page_len);
}

void check_apart(const Tensor& k, const Tensor& v) {
  const Region a("cache.k", k), b("cache.v", v);
  if (a.begin == a.end || std::max(a.begin, b.begin) >= std::min(a.end, b.end)) return;
  const std::int64_t size = static_cast<std::int64_t>(size_in_bytes(k.dtype)), off = std::abs(a.begin - b.begin);
  // Bytes from the first element to behind the last, of the dimensions from `first` on.
  const auto extent = [&](int first) {
    std::int64_t last = 0;
    for (int dim = first; dim < k.rank; ++dim) last += k.shape[dim] > 1 ? (k.shape[dim] - 1) * k.stride[dim] : 0;
    return (last + 1) * size;
  };
  bool alike = true;
  for (int dim = 0; dim < k.rank; ++dim) alike = alike && (k.shape[dim] <= 1 || k.stride[dim] == v.stride[dim]);
  // In the gap that one leaves between two pages, or between two tokens of a page.
  const auto in_gap = [&](int dim) { return off >= extent(dim + 1) && off + extent(dim + 1) <= k.stride[dim] * size; };
  const bool tokens_apart = k.shape[0] <= 1 || k.stride[0] >= k.shape[1] * k.stride[1];
  if (alike && (in_gap(0) || (tokens_apart && in_gap(1)))) return;
  refuse("cache.k", "in memory that cache.v spans", "memory of its own, or all of one in gaps of the other");
}

}  // namespace moba
