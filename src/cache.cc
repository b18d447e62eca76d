// append and decode: check, rotate, then hand one CacheCall to the steps of the plan's backend.
#include "moba/cache.h"

#include <vector>

#include "cache_call.h"
#include "cache_checks.h"
#include "checks.h"

namespace moba {

namespace {

void check_memory(const CachePlan& plan, Workspace workspace) {
  check_workspace(plan.impl().plan.impl(), workspace, plan.workspace_bytes(), "workspace_bytes");
}

void take_workspace(CacheCall& call, Workspace workspace) {
  workspace = from_aligned(workspace);
  call.scratch = workspace.first(call.plan.scratch_bytes);
  call.memory = workspace.subspan(call.plan.scratch_bytes + call.plan.rotated_bytes, call.plan.decode_bytes);
  call.k = tidy(call.k);
  call.v = tidy(call.v);
  call.centroids = tidy(call.centroids);
}

// x [Tnew, heads, d], each token rotated by its position, in the workspace; x itself where the plan has no rope.
ConstTensor rotated(const CacheCall& call, const ConstTensor& x) {
  const Plan::Impl& one = call.plan.plan.impl();
  if (!one.problem.rope) return x;
  const Plan::Impl shape = shape_of(call.plan, x.shape[0]);
  Call rope{shape, x, {}, {}, {}, {}, {}, call.scratch, {}};
  for (const CachedSequence& s : call.sequences) rope.sequences.push_back({s.q_begin, s.q_len, 0, s.length, 0, 0});
  const Tensor to(call.scratch.data() + call.plan.scratch_bytes, x.dtype, {x.shape[0], x.shape[1], x.shape[2]});
  one.steps->rope(rope, to, {});
  return to;
}

}  // namespace

void append(const CachePlan& plan, const ConstTensor& k, const ConstTensor& v, const ConstTensor& cu_seqlens,
            const Cache& cache, Workspace workspace) {
  const CacheProblem& p = plan.problem();
  const Plan::Impl& one = plan.impl().plan.impl();
  check_tensor(one, k, {"k", p.dtype, {-1, p.kv_heads, p.head_dim}});
  check_tensor(one, v, {"v", p.dtype, {k.shape[0], p.kv_heads, p.head_dim}});
  CacheCall call = checked_cache_call(plan.impl(), {k.shape[0], cu_seqlens}, cache, true);
  check_memory(plan, workspace);
  check_apart(cache.k, cache.v);
  std::vector<Region> read{{"k", k}, {"v", v}, {"cu_seqlens", cu_seqlens}};
  add_tables(cache, read);
  // k and v of the cache one at a time: they may lie in each other's gaps.
  const Region with_k[] = {{"cache.k", cache.k}, {"cache.centroids", cache.centroids}, {"workspace", workspace}};
  const Region with_v[] = {{"cache.v", cache.v}, {"cache.centroids", cache.centroids}, {"workspace", workspace}};
  check_no_overlap(with_k, read);
  check_no_overlap(with_v, read);
  take_workspace(call, workspace);
  call.plan.steps->append(call, rotated(call, tidy(k)), tidy(v));
}

void decode(const CachePlan& plan, const ConstTensor& q, const ConstTensor& cu_seqlens, const Cache& cache,
            const DecodeOutputs& outputs, Workspace workspace) {
  const CacheProblem& p = plan.problem();
  const Plan::Impl& one = plan.impl().plan.impl();
  check_tensor(one, q, {"q", p.dtype, {-1, p.q_heads, p.head_dim}});
  const std::int64_t tokens = q.shape[0];
  CacheCall call = checked_cache_call(plan.impl(), {tokens, cu_seqlens}, cache, false);
  check_tensor(one, outputs.out, {"out", p.dtype, {tokens, p.q_heads, p.head_dim}, true});
  if (outputs.lse.given()) check_tensor(one, outputs.lse, {"lse", DType::f32, {p.q_heads, tokens}, true, false});
  if (outputs.ids.given()) check_tensor(one, outputs.ids, {"ids", DType::i32, {tokens, p.q_heads, plan.slots()}, true});
  check_memory(plan, workspace);
  std::vector<Region> read{{"q", q}, {"cu_seqlens", cu_seqlens}};
  add_views(cache, read);
  add_tables(cache, read);
  const Region written[] = {{"out", outputs.out}, {"lse", outputs.lse}, {"ids", outputs.ids}, {"workspace", workspace}};
  check_no_overlap(written, read);
  take_workspace(call, workspace);
  call.plan.steps->decode(call, rotated(call, tidy(q)), {tidy(outputs.out), tidy(outputs.lse), tidy(outputs.ids)});
}

}  // namespace moba
