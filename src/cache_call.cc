#include "cache_call.h"

#include "carver.h"
#include "cpu/workers.h"

namespace moba {

namespace {

// ids, counts, offsets and rows of `tokens` tokens over a sequence of `blocks` blocks.
Selection carve(Carver& carver, const Plan::Impl& plan, std::int64_t tokens, std::int64_t blocks) {
  const Problem& p = plan.problem;
  const auto tensor = [&](auto* data, DType dtype, std::initializer_list<std::int64_t> shape) {
    return Tensor(data, dtype, shape);
  };
  const std::int64_t choices = tokens * p.q_heads * plan.slots, lists = p.kv_heads * blocks + 1;
  Selection s;
  s.ids = tensor(carver.take<std::int32_t>(choices), DType::i32, {tokens, p.q_heads, plan.slots});
  s.counts = tensor(carver.take<std::int32_t>(tokens * p.q_heads), DType::i32, {tokens, p.q_heads});
  s.offsets = tensor(carver.take<std::int64_t>(lists), DType::i64, {lists});
  s.rows = tensor(carver.take<std::int32_t>(choices), DType::i32, {choices});
  return s;
}

}  // namespace

Plan::Impl shape_of(const CachePlan::Impl& plan, std::int64_t tokens) {
  Plan::Impl shape = plan.plan.impl();
  shape.problem.total_q = tokens;
  if (shape.options.backend == Backend::cpu) shape.attend_rows = cpu::attend_rows(shape);
  return shape;
}

std::size_t SequenceCall::bytes(const CachePlan::Impl& plan) {
  const Plan::Impl& shape = plan.plan.impl();
  Carver carver;
  carve(carver, shape, shape.problem.total_q, ceil_div(plan.problem.max_length, plan.problem.config.block_size));
  return carver.used();
}

SequenceCall::SequenceCall(const CacheCall& whole, const CachedSequence& s, const ConstTensor& q,
                           const DecodeOutputs& to)
    : shape(shape_of(whole.plan, s.q_len)),
      call{shape,
           moved(q, s.q_begin * q.stride[0]),
           at_row(ConstTensor(whole.k), 0),
           at_row(ConstTensor(whole.v), 0),
           {},
           {},
           {},
           whole.scratch,
           {},
           {s.pages, whole.k.shape[1], whole.k.stride[0]},
           {s.pages, whole.v.shape[1], whole.v.stride[0]}},
      centroids(at_row(ConstTensor(whole.centroids), s.row)) {
  const std::int64_t blocks = ceil_div(s.length, shape.problem.config.block_size);
  shape.max_blocks = blocks;
  shape.problem.total_k = s.length;
  call.q.shape[0] = s.q_len;
  call.sequences = {{0, s.q_len, 0, s.length, 0, blocks}};
  Carver carver(whole.memory.data());
  selection = carve(carver, shape, s.q_len, blocks);
  if (to.ids.given()) {
    selection.ids = moved(to.ids, s.q_begin * to.ids.stride[0]);
    selection.ids.shape[0] = s.q_len;
  }
  outputs.out = moved(to.out, s.q_begin * to.out.stride[0]);
  outputs.out.shape[0] = s.q_len;
  if (!to.lse.given()) return;
  outputs.lse = moved(to.lse, s.q_begin * to.lse.stride[1]);
  outputs.lse.shape[1] = s.q_len;
}

}  // namespace moba
