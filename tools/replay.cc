#include "replay.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "device.h"
#include "views.h"

namespace moba::cli {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// One head's bytes of so many keys, or values, or centroids.
double row_bytes(const CachePlan& plan, std::int64_t rows) {
  const CacheProblem& p = plan.problem();
  return static_cast<double>(rows) * static_cast<double>(p.head_dim) * static_cast<double>(size_in_bytes(p.dtype));
}

// Tokens that a row at `position` sees of a block.
std::int64_t seen(const CachePlan& plan, std::int64_t position, std::int64_t block) {
  const std::int64_t size = plan.problem().config.block_size;
  return std::min(position + 1 - block * size, size);
}

double bytes_read(const CachePlan& plan, const ConstTensor& ids, std::int64_t position) {
  const CacheProblem& p = plan.problem();
  const std::int64_t own = position / p.config.block_size, slots = ids.shape[2], group = p.q_heads / p.kv_heads;
  const auto* id = static_cast<const std::int32_t*>(ids.data) + position * ids.stride[0];
  double keys = 0;
  for (std::int64_t head = 0; head < p.kv_heads; ++head, id += group * slots) {
    const std::set<std::int32_t> blocks(id, id + group * slots);
    for (const std::int32_t block : blocks) keys += block < 0 ? 0.0 : static_cast<double>(seen(plan, position, block));
  }
  const bool chooses = p.config.top_k > 1 && own >= p.config.top_k;
  const double centroids = chooses ? static_cast<double>(p.kv_heads * own) : 0.0;
  return (2 * keys + centroids) * row_bytes(plan, 1);
}

}  // namespace

ReplayCache::ReplayCache(const CachePlan& plan, std::int64_t page_size) {
  const CacheProblem& p = plan.problem();
  const std::int64_t size = page_size == 0 ? p.max_length : page_size, pages = ceil_div(p.max_length, size);
  const std::int64_t heads = p.kv_heads, d = p.head_dim;
  cache_.k = Tensor(nullptr, p.dtype, {pages, size, heads, d}, {size * heads * d, d, size * d, 1});
  k_ = Buffer(bytes_of(cache_.k));
  v_ = Buffer(k_.size());
  cache_.v = cache_.k;
  cache_.k.data = k_.data();
  cache_.v.data = v_.data();
  cache_.centroids = Tensor(nullptr, p.dtype, {1, plan.max_blocks(), heads, d});
  centroids_ = Buffer(bytes_of(cache_.centroids));
  cache_.centroids.data = centroids_.data();
  // NaN: what is read before it is written shows. And memory that was touched once takes no page faults later.
  for (const Buffer* memory : {&k_, &v_, &centroids_}) std::memset(memory->data(), 0xff, memory->size());
  cache_.lengths = ConstTensor(&length_, DType::i32, {1});
  if (page_size == 0) return;
  table_ = Buffer(static_cast<std::size_t>(pages) * sizeof(std::int32_t));
  for (std::int64_t i = 0; i < pages; ++i) table_.as<std::int32_t>()[i] = static_cast<std::int32_t>(pages - 1 - i);
  cache_.block_table = ConstTensor(table_.data(), DType::i32, {1, pages});
}

Cache ReplayCache::holding(std::int64_t tokens) {
  length_ = static_cast<std::int32_t>(tokens);
  return cache_;
}

double ReplayCache::bytes(const CachePlan& plan, std::int64_t page_size) {
  const CacheProblem& p = plan.problem();
  const auto size = static_cast<double>(page_size == 0 ? p.max_length : page_size);
  const auto pages = page_size == 0 ? 1.0 : static_cast<double>(ceil_div(p.max_length, page_size));
  const double head = 2 * pages * size * row_bytes(plan, 1) + row_bytes(plan, plan.max_blocks());
  return static_cast<double>(p.kv_heads) * head;
}

Replayed::Replayed(const CachePlan& plan, std::int64_t tokens, bool with_ids) {
  const CacheProblem& p = plan.problem();
  out = Tensor(nullptr, p.dtype, {tokens, p.q_heads, p.head_dim});
  out_memory = Buffer(bytes_of(out));
  out.data = out_memory.data();
  if (!with_ids) return;
  ids = Tensor(nullptr, DType::i32, {tokens, p.q_heads, plan.slots()});
  ids_memory = Buffer(bytes_of(ids));
  ids.data = ids_memory.data();
}

double replay(const CachePlan& plan, const Inputs& inputs, std::int64_t first, std::int64_t count, std::int64_t at_once,
              ReplayCache& cache, const Replayed& to, Workspace workspace) {
  Stopwatch watch;
  watch.lap();
  for (std::int64_t begin = first; begin < first + count; begin += at_once) {
    const std::int64_t tokens = std::min(at_once, first + count - begin);
    const Cache now = cache.holding(begin + tokens);
    append(plan, rows_of(inputs.k, begin, tokens), rows_of(inputs.v, begin, tokens), {}, now, workspace);
    const Tensor ids = to.ids.given() ? rows_of(to.ids, begin, tokens) : Tensor();
    decode(plan, rows_of(inputs.q, begin, tokens), {}, now, {rows_of(to.out, begin, tokens), {}, ids}, workspace);
  }
  watch.lap();
  return watch.seconds().front();
}

double mean_bytes_read(const CachePlan& plan, const ConstTensor& ids, std::int64_t first) {
  double bytes = 0;
  for (std::int64_t token = first; token < ids.shape[0]; ++token) bytes += bytes_read(plan, ids, token);
  return bytes / static_cast<double>(ids.shape[0] - first);
}

double mean_bytes_read_dense(const CachePlan& plan, std::int64_t first, std::int64_t count) {
  const double mean_keys = static_cast<double>(first) + (static_cast<double>(count) + 1) / 2;
  return 2 * static_cast<double>(plan.problem().kv_heads) * mean_keys * row_bytes(plan, 1);
}

}  // namespace moba::cli
