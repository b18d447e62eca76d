// The steps of the cuda backend: the calls of the public functions, cut into slabs and handed to the kernels.
#include <algorithm>
#include <functional>

#include "call.h"
#include "cuda/backend.h"
#include "cuda/contract.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/setup.h"
#include "refuse.h"

namespace moba::cuda {
namespace {

View<const void> view(const ConstTensor& tensor) { return {tensor.data, tensor.stride[0], tensor.stride[1]}; }
View<void> view(const Tensor& tensor) { return {tensor.data, tensor.stride[0], tensor.stride[1]}; }
View<const void> read_only(const View<void>& v) { return {v.data, v.token_stride, v.head_stride}; }

LseView lse_view(const Outputs& outputs) {
  return {static_cast<float*>(outputs.lse.data), outputs.lse.stride[0], outputs.lse.stride[1]};
}

// One call on its device: the setup of its plan, its stream, and the batch, which every call reads anew.
struct DeviceCall {
  // `rotates`: q and k are, or were, turned by their positions, which a table of the caller's has from 0 on.
  explicit DeviceCall(const Call& given, bool rotates = false)
      : call(given),
        setup(*given.plan.cuda),
        shape(setup.shape),
        current(setup.device.index),
        stream(static_cast<cudaStream_t>(given.stream.handle)),
        carver(given.scratch.data()) {
    const BatchMemory memory(carver, shape);
    batch = {memory.sequences, memory.blocks};
    const Problem& p = given.plan.problem;
    prepare_batch(shape, static_cast<const std::int32_t*>(given.cu_seqlens_q.data),
                  static_cast<const std::int32_t*>(given.cu_seqlens_k.data), p.max_seqlen_q, p.max_seqlen_k,
                  rotates && p.rope && p.rope->cos.given(), memory.sequences, memory.blocks, stream);
  }

  Call call;
  const Setup& setup;
  const Shape& shape;
  CurrentDevice current;
  cudaStream_t stream;
  Carver carver;  // what is left of the scratch
  Batch batch{};
};

Slab whole(const Shape& shape) { return {0, shape.kv_heads, 0, shape.total_q}; }

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

// ids or counts of the caller's selection, as seen from a slab.
IdsView<std::int32_t> slab_view(const Shape& shape, const Tensor& tensor, Slab slab) {
  const bool shared = tensor.shape[1] == shape.kv_heads && shape.group > 1;
  const std::int64_t token = tensor.stride[0], head = tensor.stride[1];
  const std::int64_t head_stride = shared ? head : head * shape.group;
  return {static_cast<std::int32_t*>(tensor.data) + slab.token_begin * token + slab.head_begin * head_stride,
          head_stride, token, shared ? 0 : head};
}
IdsView<const std::int32_t> read_only(const IdsView<std::int32_t>& v) {
  return {v.data, v.head_stride, v.token_stride, v.group_stride};
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

RopeParameters rope_parameters(const Plan::Impl& plan) {
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
  return r;
}

void rotate(DeviceCall& c, const Tensor& q_rotated, const Tensor& k_rotated, const View<void>& centroids) {
  RopeParameters parameters = rope_parameters(c.call.plan);
  const RopeMemory memory(c.carver, c.setup);
  if (parameters.cos == nullptr) rope_steps(parameters, memory.steps, c.stream);
  parameters.steps = memory.steps;
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
  // The transpose is no longer that of the ids.
  if (selection.offsets.given())
    MOBA_CUDA(cudaMemsetAsync(selection.offsets.data, 0xff, sizeof(std::int64_t), c.stream));
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
  const SlabMemory slab_memory(c.carver, c.setup, {0, c.setup.slab_heads, 0, c.setup.slab_tokens});
  for_each_slab(c.setup, [&](Slab slab) {
    const std::int64_t row = c.shape.slots, token = row * c.shape.group;
    const IdsView<std::int32_t> ids{slab_memory.ids, token * slab.tokens, token, row};
    launch_gate(c, slab, view(c.call.q), read_only(centroids), ids, {});
    done("gate");
    attend_slab(c, slab, read_only(ids), slab_memory, outputs, done);
  });
}

void forward(const Call& call, const Intermediates& memory, const Outputs& outputs) {
  forward_observed(call, memory, outputs, kUnobserved);
}

}  // namespace

const Steps kSteps = {rope, pool, gate, index, attend, dense, merge, forward, nullptr, nullptr};

void forward_by_stages(const Call& call, const Intermediates& memory, const Outputs& outputs,
                       const std::function<void(const char*)>& done) {
  forward_observed(call, memory, outputs, done);
}

}  // namespace moba::cuda
