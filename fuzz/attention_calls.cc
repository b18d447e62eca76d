#include <algorithm>
#include <numeric>

#include "calls.h"

namespace moba::fuzz {

namespace {

// A problem with the lengths of its sequences, before anything is spoilt.
struct Batch {
  Problem problem;
  std::vector<std::int32_t> q_starts{0}, k_starts{0};
};

void spoil(Bytes& bytes, Problem& p) {
  std::int64_t* const fields[] = {&p.q_heads, &p.kv_heads, &p.head_dim,     &p.batch,
                                  &p.total_q, &p.total_k,  &p.max_seqlen_q, &p.max_seqlen_k};
  for (std::int64_t times = bytes.number(1, 3); times > 0; --times) {
    *fields[bytes.number(0, std::ssize(fields) - 1)] = bytes.odd_number();
  }
}

Batch draw_batch(Bytes& bytes, Views& tables) {
  Batch batch;
  Problem& p = batch.problem;
  p.dtype = static_cast<DType>(bytes.one_in(64) ? bytes.number(0, 9) : bytes.number(0, 2));
  p.kv_heads = bytes.pick<std::int64_t>({1, 2, 3});
  p.q_heads = p.kv_heads * bytes.pick<std::int64_t>({1, 2, 3});
  p.head_dim = bytes.one_in(16) ? bytes.number(8, 256) : bytes.number(8, 24);
  p.batch = bytes.pick<std::int64_t>({1, 1, 2, 3, 0});
  for (std::int64_t s = 0; s < p.batch; ++s) {
    const std::int64_t q = bytes.number(0, 24), k = bytes.one_in(2) ? bytes.number(0, 40) : q;
    batch.q_starts.push_back(static_cast<std::int32_t>(p.total_q += q));
    batch.k_starts.push_back(static_cast<std::int32_t>(p.total_k += k));
  }
  if (bytes.one_in(4)) p.max_seqlen_q = p.max_seqlen_k = 40;
  p.config = draw_config(bytes);
  if (bytes.one_in(3)) p.rope = draw_rope(bytes, p.head_dim, std::max<std::int64_t>(p.total_k, 1), tables);
  if (bytes.one_in(8)) spoil(bytes, p);
  return batch;
}

// Every argument of every function, by its number among the views.
struct Arguments {
  int q, k, v, cu_q, cu_k, out, lse, ids, counts, offsets, rows, centroids, q_rotated, k_rotated, partial_out,
      partial_lse, results_out, results_lse, dout, dq, dk, dv, workspace, backward_workspace, memory;

  Arguments(const Batch& batch, const Plan& plan, Bytes& bytes, Views& views) {
    const Problem& p = plan.problem();
    const DType dtype = p.dtype;
    const std::int64_t d = p.head_dim, shared = bytes.one_in(4) ? p.kv_heads : p.q_heads;
    q = views.add("q", dtype, {p.total_q, p.q_heads, d});
    k = views.add("k", dtype, {p.total_k, p.kv_heads, d});
    v = views.add("v", dtype, {p.total_k, p.kv_heads, d});
    cu_q = views.add_table("cu_seqlens_q", batch.q_starts);
    cu_k = views.add_table("cu_seqlens_k", batch.k_starts);
    out = views.add("out", dtype, {p.total_q, p.q_heads, d});
    lse = views.add("lse", DType::f32, {p.q_heads, p.total_q});
    ids = views.add("selection.ids", DType::i32, {p.total_q, shared, plan.slots()});
    counts = views.add("selection.counts", DType::i32, {p.total_q, shared});
    offsets = views.add("selection.offsets", DType::i64, {p.kv_heads * plan.max_blocks() + 1});
    rows = views.add("selection.rows", DType::i32, {p.total_q * p.q_heads * plan.slots()});
    centroids = views.add("centroids", dtype, {plan.max_blocks(), p.kv_heads, d});
    q_rotated = views.add("q_rotated", dtype, {p.total_q, p.q_heads, d});
    k_rotated = views.add("k_rotated", dtype, {p.total_k, p.kv_heads, d});
    partial_out = views.add("partial out", dtype, {p.total_q, p.q_heads, d});
    partial_lse = views.add("partial lse", DType::f32, {p.q_heads, p.total_q});
    results_out = views.add("results.out", dtype, {p.total_q, p.q_heads, d});
    results_lse = views.add("results.lse", DType::f32, {p.q_heads, p.total_q});
    dout = views.add("dout", dtype, {p.total_q, p.q_heads, d});
    dq = views.add("gradients.dq", dtype, {p.total_q, p.q_heads, d});
    dk = views.add("gradients.dk", dtype, {p.total_k, p.kv_heads, d});
    dv = views.add("gradients.dv", dtype, {p.total_k, p.kv_heads, d});
    workspace = views.add_memory("workspace", plan.workspace_bytes());
    backward_workspace = views.add_memory("workspace", plan.backward_workspace_bytes());
    memory = views.add_memory("memory", plan.selection_bytes(bytes.one_in(2)));
  }
};

void call(const Plan& plan, const Views& views, const Arguments& a, bool keep, std::int64_t function) {
  const Inputs inputs{views[a.q], views[a.k], views[a.v], views[a.cu_q], views[a.cu_k]};
  const Outputs outputs{views[a.out], views[a.lse]};
  const Selection selection{views[a.ids], views[a.counts], views[a.offsets], views[a.rows]};
  const Workspace workspace = views.memory(a.workspace), more = views.memory(a.backward_workspace);
  const ConstOutputs results{views[a.results_out], views[a.results_lse]};
  const Gradients gradients{views[a.dq], views[a.dk], views[a.dv]};
  const Outputs partials[] = {{views[a.partial_out], views[a.partial_lse]},
                              {views[a.results_out], views[a.results_lse]}};
  switch (function) {
    case 0:
      return keep ? forward(plan, inputs, selection, outputs, workspace) : forward(plan, inputs, outputs, workspace);
    case 1:
      return dense(plan, inputs, outputs, workspace);
    case 2:
      return backward(plan, inputs, selection, results, views[a.dout], gradients, more);
    case 3:
      return dense_backward(plan, inputs, results, views[a.dout], gradients, more);
    case 4:
      return rope(plan, inputs, views[a.q_rotated], views[a.k_rotated], workspace);
    case 5:
      return pool(plan, inputs, views[a.centroids], workspace);
    case 6:
      return gate(plan, inputs, views[a.centroids], selection, workspace);
    case 7:
      return index(plan, inputs, selection, workspace);
    case 8:
      return select(plan, inputs, selection, workspace);
    case 9:
      return attend(plan, inputs, selection, outputs, workspace);
    case 10:
      return merge(plan, partials, outputs);
    default:
      make_selection(plan, views.memory(a.memory), keep);
  }
}

constexpr const char* kNames[] = {"forward", "dense", "backward", "dense_backward", "rope",  "pool",
                                  "gate",    "index", "select",   "attend",         "merge", "make_selection"};

}  // namespace

void call_attention(Bytes& bytes) {
  struct Step {
    std::int64_t function;
    bool keep, spoil;  // spoil: memory, behind it
  };
  std::vector<Step> steps(static_cast<std::size_t>(bytes.number(1, 4)));
  for (Step& step : steps) step = {bytes.number(0, std::ssize(kNames) - 1), bytes.one_in(2), bytes.one_in(3)};
  Views tables(bytes), views(bytes);
  const Batch batch = draw_batch(bytes, tables);
  const Options options = draw_options(bytes);
  std::optional<Plan> plan;
  if (!accepted("Plan", [&] { plan.emplace(batch.problem, options); })) return;
  plan->kernels();
  accepted("arithmetic", [&] { plan->arithmetic(); });
  const std::size_t sizes[] = {plan->workspace_bytes(), plan->backward_workspace_bytes(), plan->selection_bytes()};
  if (std::ranges::max(sizes) > std::size_t{2} << 20) return;
  const Arguments arguments(batch, *plan, bytes, views);
  if (!views.place()) return;
  for (const Step& step : steps) {
    judge(kNames[step.function], views, [&] { call(*plan, views, arguments, step.keep, step.function); });
    if (step.spoil) views.spoil_memory();
  }
}

}  // namespace moba::fuzz
