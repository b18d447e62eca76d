// backward and dense_backward: slab by slab, for each pass over parts of the blocks
//
//   units ─ products ─ sums of shares: dk, dv ─ sums of partials: dq
//
// where the lists of a slab are made anew from the ids, and what dq or dk and dv are summed up from over several passes
// or slabs is kept in float32. Behind all, dq and dk are turned back in place where the plan has a rope.
#include <algorithm>
#include <functional>

#include "call.h"
#include "cuda/backend.h"
#include "cuda/contract.h"
#include "cuda/device_call.h"
#include "cuda/launch.h"
#include "cuda/setup.h"

namespace moba::cuda {
namespace {

// What one call works on.
struct Job {
  DeviceCall& call;
  const BackwardSetup& setup;
  const Selection* selection;  // null for dense
  const Cotangents& given;
  const Gradients& gradients;
  const std::function<void(const char*)>& done;  // behind each stage, with its name
  BackwardMemory memory;

  bool dense() const { return selection == nullptr; }
  bool sums_keys() const { return setup.sums_keys(call.shape); }
  Pass pass(int part_begin) const {
    return {setup.sections, setup.part_keys, part_begin, std::min(setup.parts, setup.all_parts - part_begin)};
  }
};

void list_units(const Job& job, Start start, Slab slab, const Pass& pass) {
  const DeviceCall& c = job.call;
  const BackwardMemory& m = job.memory;
  if (job.dense()) {
    return list_dense_backward_units(start, c.shape, slab, c.batch, pass, m.units, m.share_list, c.stream);
  }
  list_backward_units(start, c.shape, slab, c.batch, m.index, pass, m.units, m.share_list, c.stream);
}

// What the products of a pass need. Its kernels run beside one another (launch.h), the first of them behind the memset:
// none touches what another writes.
void prepare_pass(const Job& job, Slab slab, const Pass& pass) {
  const DeviceCall& c = job.call;
  const BackwardMemory& m = job.memory;
  const bool is_first = pass.part_begin == 0, fills = is_first && !job.sums_keys() && c.shape.total_k > 0;
  MOBA_CUDA(cudaMemsetAsync(m.share_list.counters, 0, 2 * sizeof(std::int32_t), c.stream));
  if (fills) {
    fill_keys(c.shape, slab, c.batch, job.dense() ? nullptr : &m.index, view(job.gradients.dk), view(job.gradients.dv),
              c.stream);
    job.done("keys");
  }
  list_units(job, fills ? Start::beside : Start::behind, slab, pass);
  job.done("units");
  if (!is_first) return;
  const ConstTensor& lse = job.given.lse;
  row_values(c.shape, slab, view(job.given.out), view(job.given.dout), {lse.data, lse.stride[1], lse.stride[0]},
             m.values, c.stream);
  job.done("rows");
}

// One pass over a slab whose lists are there.
void run_pass(const Job& job, Slab slab, const Pass& pass) {
  const DeviceCall& c = job.call;
  const BackwardMemory& m = job.memory;
  const View<void> dk = view(job.gradients.dk), dv = view(job.gradients.dv);
  prepare_pass(job, slab, pass);
  const BackwardInput input{
      view(c.call.q), view(c.call.k), view(c.call.v), view(job.given.dout), job.dense() ? nullptr : m.index.rows,
      m.values};
  const BackwardOutput output{m.dq, m.part_stride, m.shares, dk, dv, m.key_totals, pass.part_keys};
  const auto kernel = c.setup.backward == BackwardKernel::sm90 ? backward_sm90 : backward_portable;
  kernel(c.shape, slab, input, m.units, output, c.stream);
  job.done("products");
  sum_shares(c.shape, pass, m.share_list, m.shares, dk, dv, m.key_totals, c.stream);
  job.done("shares");

  IdsView<const std::int32_t> ids{};
  if (!job.dense()) ids = read_only(slab_view(c.shape, job.selection->ids, slab));
  const bool is_first = pass.part_begin == 0, is_last = pass.part_begin + pass.parts == job.setup.all_parts;
  sum_queries(c.shape, slab, c.batch, pass, {ids, m.index, m.dq, m.part_stride, m.query_totals, is_first, is_last},
              view(job.gradients.dq), c.stream);
  job.done("queries");
}

void run_slab(const Job& job, Slab slab) {
  const DeviceCall& c = job.call;
  const BackwardMemory& m = job.memory;
  if (!job.dense()) {
    const IdsView<const std::int32_t> ids = read_only(slab_view(c.shape, job.selection->ids, slab));
    index(c.shape, slab, c.batch, ids, {}, m.index, nullptr, m.index_scratch, c.stream);
    job.done("index");
  }
  for (int part = 0; part < job.setup.all_parts; part += job.setup.parts) run_pass(job, slab, job.pass(part));
}

void run(const Job& job) {
  const DeviceCall& c = job.call;
  const Shape& s = c.shape;
  const std::size_t totals = sizeof(float) * static_cast<std::size_t>(s.total_k) * static_cast<std::size_t>(s.head_dim);
  for (int head = 0; head < s.kv_heads; head += job.setup.slab_heads) {
    if (job.sums_keys()) {
      MOBA_CUDA(cudaMemsetAsync(job.memory.key_totals.dk, 0, totals, c.stream));
      MOBA_CUDA(cudaMemsetAsync(job.memory.key_totals.dv, 0, totals, c.stream));
    }
    const int heads = std::min(job.setup.slab_heads, s.kv_heads - head);
    for (int token = 0; token < std::max(1, s.total_q); token += job.setup.slab_tokens) {
      run_slab(job, {head, heads, token, std::min(job.setup.slab_tokens, s.total_q - token)});
    }
    if (job.sums_keys()) {
      write_totals(s, c.batch, head, job.memory.key_totals, view(job.gradients.dk), view(job.gradients.dv), c.stream);
      job.done("keys");
    }
  }
}

void turn_back(DeviceCall& c, const Gradients& gradients) {
  RopeParameters parameters = rope_parameters(c);
  parameters.back = true;
  const View<void> dq = view(gradients.dq), dk = view(gradients.dk);
  rope_queries(c.shape, parameters, c.batch, read_only(dq), dq, c.stream);
  rope_keys(c.shape, parameters, c.batch, read_only(dk), dk, {}, c.stream);
}

void run(const Call& call, const Selection* selection, const Cotangents& given, const Gradients& gradients,
         const std::function<void(const char*)>& done) {
  DeviceCall c(call, true);
  done("batch");
  const BackwardSetup& setup = selection == nullptr ? c.setup.dense_backward : c.setup.chosen_backward;
  Carver behind_rope = c.carver;
  const RopeMemory rope(behind_rope, c.setup);
  run(Job{c, setup, selection, given, gradients, done, BackwardMemory(behind_rope, c.setup, setup)});
  if (!call.plan.rope) return;
  turn_back(c, gradients);
  done("rope");
}

void unobserved(const char*) {}

}  // namespace

void backward(const Call& call, const Selection& selection, const Cotangents& given, const Gradients& gradients) {
  run(call, &selection, given, gradients, unobserved);
}

void dense_backward(const Call& call, const Cotangents& given, const Gradients& gradients) {
  run(call, nullptr, given, gradients, unobserved);
}

void backward_by_stages(const Call& call, const Selection& selection, const Cotangents& given,
                        const Gradients& gradients, const std::function<void(const char*)>& done) {
  run(call, &selection, given, gradients, done);
}

}  // namespace moba::cuda
