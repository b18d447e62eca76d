#include <algorithm>
#include <numeric>

#include "calls.h"

namespace moba::fuzz {

namespace {

enum class Form { contiguous, block_table, csr };

CacheProblem draw_problem(Bytes& bytes, Views& tables) {
  CacheProblem p;
  p.dtype = static_cast<DType>(bytes.one_in(64) ? bytes.number(0, 9) : bytes.number(0, 2));
  p.kv_heads = bytes.pick<std::int64_t>({1, 2, 3});
  p.q_heads = p.kv_heads * bytes.pick<std::int64_t>({1, 2, 3});
  p.head_dim = bytes.one_in(16) ? bytes.number(8, 256) : bytes.number(8, 24);
  p.max_batch = bytes.number(1, 4);
  p.max_new_tokens = bytes.number(1, 40);
  p.max_length = bytes.number(1, 80);
  p.config = draw_config(bytes);
  p.config.causal = !bytes.one_in(64);
  if (bytes.one_in(3)) p.rope = draw_rope(bytes, p.head_dim, p.max_length, tables);
  if (bytes.one_in(8)) {
    std::int64_t* const fields[] = {&p.q_heads,   &p.kv_heads,       &p.head_dim,
                                    &p.max_batch, &p.max_new_tokens, &p.max_length};
    *fields[bytes.number(0, std::ssize(fields) - 1)] = bytes.odd_number();
  }
  return p;
}

// Sequences within the bounds of a plan, mostly, and their tables.
struct Sequences {
  std::vector<std::int32_t> starts{0}, lengths, block_table, indptr{0}, indices, last_page_len;
  std::int64_t page_size = 1, max_pages = 0, pages = 0, blocks = 0;

  Sequences(const CacheProblem& p, Form form, Bytes& bytes) {
    const std::int64_t batch = bytes.number(0, std::min<std::int64_t>(p.max_batch, 4));
    page_size = form == Form::contiguous ? std::min<std::int64_t>(p.max_length, 80) : bytes.number(1, 20);
    max_pages = (std::min<std::int64_t>(p.max_length, 80) + page_size - 1) / page_size;
    pages = form == Form::contiguous ? batch : batch * max_pages;
    blocks = std::min<std::int64_t>(p.max_length, 80) / p.config.block_size;
    std::int64_t left = p.max_new_tokens;
    for (std::int64_t s = 0; s < batch; ++s) {
      const std::int64_t length = bytes.number(0, std::min<std::int64_t>(p.max_length, 80));
      const std::int64_t added = bytes.number(0, std::min(length, left));
      left -= added;
      lengths.push_back(static_cast<std::int32_t>(length));
      starts.push_back(static_cast<std::int32_t>(starts.back() + added));
      const std::int64_t used = (length + page_size - 1) / page_size;
      for (std::int64_t i = 0; i < max_pages; ++i) {
        block_table.push_back(static_cast<std::int32_t>(pages - 1 - (s * max_pages + i)));
        if (i < used) indices.push_back(block_table.back());
      }
      indptr.push_back(static_cast<std::int32_t>(indices.size()));
      last_page_len.push_back(static_cast<std::int32_t>(length - (used - 1) * page_size));
    }
  }
};

struct Arguments {
  int q, k, v, cu_seqlens, cache_k, cache_v, centroids, out, lse, ids, workspace;
  int lengths = -1, block_table = -1, indptr = -1, indices = -1, last_page_len = -1;

  Arguments(const CachePlan& plan, Form form, Bytes& bytes, Views& views) {
    const CacheProblem& p = plan.problem();
    const Sequences s(p, form, bytes);
    const DType dtype = p.dtype;
    const std::int64_t d = p.head_dim, tokens = s.starts.back(), batch = std::ssize(s.lengths);
    q = views.add("q", dtype, {tokens, p.q_heads, d});
    k = views.add("k", dtype, {tokens, p.kv_heads, d});
    v = views.add("v", dtype, {tokens, p.kv_heads, d});
    cu_seqlens = views.add_table("cu_seqlens", s.starts);
    cache_k = views.add("cache.k", dtype, {s.pages, s.page_size, p.kv_heads, d});
    cache_v = views.add("cache.v", dtype, {s.pages, s.page_size, p.kv_heads, d});
    centroids = views.add("cache.centroids", dtype, {batch, s.blocks, p.kv_heads, d});
    out = views.add("out", dtype, {tokens, p.q_heads, d});
    lse = views.add("lse", DType::f32, {p.q_heads, tokens});
    ids = views.add("ids", DType::i32, {tokens, p.q_heads, plan.slots()});
    workspace = views.add_memory("workspace", plan.workspace_bytes());
    const bool too_much = bytes.one_in(32);
    if (form != Form::csr || too_much) lengths = views.add_table("cache.lengths", s.lengths);
    if (form == Form::block_table || too_much) {
      block_table = views.add_table("cache.block_table", s.block_table, {batch, s.max_pages});
    }
    if (form != Form::csr) return;
    indptr = views.add_table("cache.indptr", s.indptr);
    indices = views.add_table("cache.indices", s.indices);
    last_page_len = views.add_table("cache.last_page_len", s.last_page_len);
  }

  Cache cache(const Views& views) const {
    const auto table = [&](int view) { return view < 0 ? ConstTensor() : ConstTensor(views[view]); };
    Cache cache;
    cache.k = views[cache_k];
    cache.v = views[cache_v];
    cache.centroids = views[centroids];
    cache.lengths = table(lengths);
    cache.block_table = table(block_table);
    cache.indptr = table(indptr);
    cache.indices = table(indices);
    cache.last_page_len = table(last_page_len);
    return cache;
  }
};

}  // namespace

void call_cache(Bytes& bytes) {
  struct Step {
    bool appends, spoil;  // spoil: memory, behind it
  };
  std::vector<Step> steps(static_cast<std::size_t>(bytes.number(1, 4)));
  for (Step& step : steps) step = {bytes.one_in(2), bytes.one_in(3)};
  const Form form = bytes.pick({Form::contiguous, Form::block_table, Form::csr});
  Views tables(bytes), views(bytes);
  const CacheProblem problem = draw_problem(bytes, tables);
  const Options options = draw_options(bytes);
  std::optional<CachePlan> plan;
  if (!accepted("CachePlan", [&] { plan.emplace(problem, options); })) return;
  plan->kernels();
  if (plan->workspace_bytes() > std::size_t{2} << 20) return;
  const Arguments a(*plan, form, bytes, views);
  if (!views.place()) return;
  const Cache cache = a.cache(views);
  for (const Step& step : steps) {
    judge(step.appends ? "append" : "decode", views, [&] {
      const Workspace workspace = views.memory(a.workspace);
      if (step.appends) return append(*plan, views[a.k], views[a.v], views[a.cu_seqlens], cache, workspace);
      const DecodeOutputs outputs{views[a.out], views[a.lse], views[a.ids]};
      decode(*plan, views[a.q], views[a.cu_seqlens], cache, outputs, workspace);
    });
    if (step.spoil) views.spoil_memory();
  }
}

}  // namespace moba::fuzz
