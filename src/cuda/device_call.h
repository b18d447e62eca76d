// One call of a public function on its device, as the steps of the backend see it.
#pragma once

#include <cstdint>

#include "call.h"
#include "carver.h"
#include "cuda/contract.h"
#include "cuda/device.h"
#include "cuda/setup.h"

namespace moba::cuda {

inline View<const void> view(const ConstTensor& tensor) { return {tensor.data, tensor.stride[0], tensor.stride[1]}; }
inline View<void> view(const Tensor& tensor) { return {tensor.data, tensor.stride[0], tensor.stride[1]}; }
inline View<const void> read_only(const View<void>& v) { return {v.data, v.token_stride, v.head_stride}; }

inline LseView lse_view(const Outputs& outputs) {
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

inline Slab whole(const Shape& shape) { return {0, shape.kv_heads, 0, shape.total_q}; }

// ids or counts of the caller's selection, as seen from a slab.
inline IdsView<std::int32_t> slab_view(const Shape& shape, const Tensor& tensor, Slab slab) {
  const bool shared = tensor.shape[1] == shape.kv_heads && shape.group > 1;
  const std::int64_t token = tensor.stride[0], head = tensor.stride[1];
  const std::int64_t head_stride = shared ? head : head * shape.group;
  return {static_cast<std::int32_t*>(tensor.data) + slab.token_begin * token + slab.head_begin * head_stride,
          head_stride, token, shared ? 0 : head};
}
inline IdsView<const std::int32_t> read_only(const IdsView<std::int32_t>& v) {
  return {v.data, v.head_stride, v.token_stride, v.group_stride};
}

// Those of the plan's rope; puts the steps of its angles, where they are computed, into the scratch.
RopeParameters rope_parameters(DeviceCall& c);

}  // namespace moba::cuda
