// The steps of the cuda backend: the calls of the public functions, cut into slabs and handed to the kernels.
#include <algorithm>
#include <functional>

#include "call.h"
#include "cuda/backend.h"
#include "cuda/contract.h"
#include "cuda/device_call.h"
#include "cuda/launch.h"
#include "cuda/setup.h"
#include "refuse.h"

namespace moba::cuda {
namespace {

// Every slab of the call, as large as the plan says.
template <class F>
void for_each_slab(const Setup& setup, F f) {
  const Shape& s = setup.shape;
  for (int head = 0; head < s.kv_heads; head += setup.slab_heads) {
    for (int token = 0; token < s.total_q; token += setup.slab_tokens) {
      f(Slab{head, std::min(setup.slab_heads, s.kv_heads - head), token,
             std::min(setup.slab_tokens, s.total_q - token)});
    }
  }
}

CountsView counts_view(const Shape& shape, const Selection& selection, Slab slab) {
  return selection.counts.given() ? slab_view(shape, selection.counts, slab) : CountsView{};
}

// The transpose is not, or no longer, that of the ids.
void mark_stale(const DeviceCall& c, const Selection& selection) {
  if (!selection.offsets.given()) return;
  MOBA_CUDA(cudaMemsetAsync(selection.offsets.data, 0xff, sizeof(std::int64_t), c.stream));
}

void launch_gate(const DeviceCall& c, Slab slab, const View<const void>& q, const View<const void>& centroids,
                 const IdsView<std::int32_t>& ids, const CountsView& counts) {
  const auto kernel = c.setup.gate == GateKernel::sm90 ? gate_sm90 : gate_portable;
  kernel(c.shape, slab, c.batch, q, centroids, ids, counts, c.stream);
}

void launch_attend(const DeviceCall& c, AttendKernel kernel, const AttendInput& input, const UnitList& units,
                   const AttendOutput& output) {
  switch (kernel) {
    case AttendKernel::resident_sm90:
      return attend_resident_sm90(c.shape, input, units, output, c.stream);
    case AttendKernel::stream_sm90:
      return attend_stream_sm90(c.shape, input, units, output, c.stream);
    case AttendKernel::portable:
      return attend_portable(c.shape, input, units, output, c.stream);
  }
}

// From the ids of a slab to its rows of out and lse. `done` is called behind each stage, with its name.
template <class Done>
void attend_slab(const DeviceCall& c, Slab slab, const IdsView<const std::int32_t>& ids, const SlabMemory& memory,
                 const Outputs& outputs, const Done& done) {
  index(c.shape, slab, c.batch, ids, {}, memory.index, nullptr, memory.index_scratch, c.stream);
  done("index");
  list_units(c.shape, slab, c.batch, memory.index, c.setup.rows_per_unit, memory.units, c.stream);
  done("units");
  launch_attend(c, c.setup.attend, {view(c.call.q), view(c.call.k), view(c.call.v), memory.index.rows}, memory.units,
                {memory.partials, {}, {}});
  done("attend");
  merge(c.shape, slab, memory.index, memory.partials, view(outputs.out), lse_view(outputs), c.stream);
  done("merge");
}
constexpr auto kUnobserved = [](const char*) {};

void rotate(DeviceCall& c, const Tensor& q_rotated, const Tensor& k_rotated, const View<void>& centroids) {
  const RopeParameters parameters = rope_parameters(c);
  rope_queries(c.shape, parameters, c.batch, view(c.call.q), view(q_rotated), c.stream);
  rope_keys(c.shape, parameters, c.batch, view(c.call.k), view(k_rotated), centroids, c.stream);
}

void rope(const Call& call, const Tensor& q_rotated, const Tensor& k_rotated) {
  DeviceCall c(call, true);
  rotate(c, q_rotated, k_rotated, {});
}

void pool(const Call& call, const Tensor& centroids) {
  const DeviceCall c(call);
  pool(c.shape, c.batch, view(call.k), view(centroids), c.stream);
}

void gate(const Call& call, const ConstTensor& centroids, const Selection& selection) {
  const DeviceCall c(call);
  const Slab slab = whole(c.shape);
  launch_gate(c, slab, view(call.q), view(centroids), slab_view(c.shape, selection.ids, slab),
              slab_view(c.shape, selection.counts, slab));
  mark_stale(c, selection);
}

void choose_all(const Call& call, const Selection& selection) {
  const DeviceCall c(call);
  const Slab slab = whole(c.shape);
  choose_all(c.shape, c.batch, slab_view(c.shape, selection.ids, slab), counts_view(c.shape, selection, slab),
             c.stream);
  mark_stale(c, selection);
}

void index(const Call& call, const Selection& selection) {
  DeviceCall c(call);
  const Shape& s = c.shape;
  auto* const offsets = static_cast<std::int64_t*>(selection.offsets.data);
  auto* const rows = static_cast<std::int32_t*>(selection.rows.data);
  const IndexMemory memory(c.carver, s, {0, c.setup.index_heads, 0, s.total_q});
  for (int head = 0; head < s.kv_heads; head += c.setup.index_heads) {
    const Slab slab{head, std::min(c.setup.index_heads, s.kv_heads - head), 0, s.total_q};
    std::int64_t* const first = offsets + std::int64_t{head} * s.max_blocks;
    index(s, slab, c.batch, read_only(slab_view(s, selection.ids, slab)), slab_view(s, selection.counts, slab),
          {first, rows, nullptr}, head == 0 ? nullptr : first, memory.scratch, c.stream);
  }
}

void attend(const Call& call, const Selection& selection, const Outputs& outputs) {
  DeviceCall c(call);
  const SlabMemory memory(c.carver, c.setup, {0, c.setup.slab_heads, 0, c.setup.slab_tokens});
  for_each_slab(c.setup, [&](Slab slab) {
    attend_slab(c, slab, read_only(slab_view(c.shape, selection.ids, slab)), memory, outputs, kUnobserved);
  });
}

void dense(const Call& call, const Outputs& outputs) {
  DeviceCall c(call, true);
  const DenseMemory memory(c.carver, c.setup);
  list_dense_units(c.shape, c.batch, c.setup.dense_rows_per_unit, memory.units, c.stream);
  launch_attend(c, c.setup.dense, {view(call.q), view(call.k), view(call.v), nullptr}, memory.units,
                {{}, view(outputs.out), lse_view(outputs)});
  fill_dense_rest(c.shape, c.batch, view(outputs.out), lse_view(outputs), c.stream);
}

void merge(const Call& call, std::span<const Outputs> partials, const Outputs& outputs) {
  const Setup& setup = *call.plan.cuda;
  check_range("number of partials", static_cast<std::int64_t>(partials.size()), 0, kMaxCallerPartials);
  const CurrentDevice current(setup.device.index);
  CallerPartials given{};
  for (const Outputs& partial : partials) {
    given.out[given.count] = read_only(view(partial.out));
    given.lse[given.count++] = {partial.lse.data, partial.lse.stride[1], partial.lse.stride[0]};
  }
  merge_partials(setup.shape, given, view(outputs.out), lse_view(outputs),
                 static_cast<cudaStream_t>(call.stream.handle));
}

template <class Done>
void forward_observed(const Call& given, const Intermediates& memory, const Outputs& outputs, const Done& done) {
  DeviceCall c(given, true);
  done("batch");
  const View<void> centroids = view(memory.centroids);
  if (given.plan.rope) {
    rotate(c, memory.q_rotated, memory.k_rotated, centroids);
    c.call.q = memory.q_rotated;
    c.call.k = memory.k_rotated;
    done("rope");
  } else {
    pool(c.shape, c.batch, view(given.k), centroids, c.stream);
    done("pool");
  }
  mark_stale(c, memory.selection);
  const SlabMemory slab_memory(c.carver, c.setup, {0, c.setup.slab_heads, 0, c.setup.slab_tokens});
  for_each_slab(c.setup, [&](Slab slab) {
    const std::int64_t row = c.shape.slots, token = row * c.shape.group;
    const bool keeps = memory.selection.ids.given();
    const IdsView<std::int32_t> ids = keeps ? slab_view(c.shape, memory.selection.ids, slab)
                                            : IdsView<std::int32_t>{slab_memory.ids, token * slab.tokens, token, row};
    launch_gate(c, slab, view(c.call.q), read_only(centroids), ids, counts_view(c.shape, memory.selection, slab));
    done("gate");
    attend_slab(c, slab, read_only(ids), slab_memory, outputs, done);
  });
}

void forward(const Call& call, const Intermediates& memory, const Outputs& outputs) {
  forward_observed(call, memory, outputs, kUnobserved);
}

}  // namespace

RopeParameters rope_parameters(DeviceCall& c) {
  const Plan::Impl& plan = c.call.plan;
  const Rope& rope = *plan.problem.rope;
  RopeParameters r{};
  r.interleaved = rope.style == RopeStyle::interleaved;
  r.pairs = static_cast<int>(plan.rope->pairs());
  if (rope.cos.given()) {
    r.cos = static_cast<const float*>(rope.cos.data);
    r.sin = static_cast<const float*>(rope.sin.data);
    r.cos_stride = rope.cos.stride[0];
    r.sin_stride = rope.sin.stride[0];
    return r;
  }
  r.magnitude = plan.rope->magnitude();
  for (int i = 0; i < r.pairs; ++i) r.frequency[i] = plan.rope->frequency(i);
  const RopeMemory memory(c.carver, c.setup);
  rope_steps(r, memory.steps, c.stream);
  r.steps = memory.steps;
  return r;
}

const Steps kSteps = {rope, pool, gate, index, attend, dense, merge, forward, choose_all, backward, dense_backward};

void forward_by_stages(const Call& call, const Intermediates& memory, const Outputs& outputs,
                       const std::function<void(const char*)>& done) {
  forward_observed(call, memory, outputs, done);
}

}  // namespace moba::cuda
