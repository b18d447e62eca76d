#include "cuda_workload.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/setup.h"

namespace moba::bench {

namespace {

constexpr std::size_t kElement = 2;  // bytes, f16 and bf16

std::size_t bytes(std::int64_t tokens, std::int64_t heads, const Problem& problem) {
  return kElement * static_cast<std::size_t>(tokens * heads * problem.head_dim);
}
std::size_t q_bytes(const Problem& p) { return bytes(p.total_q, p.q_heads, p); }
std::size_t k_bytes(const Problem& p) { return bytes(p.total_k, p.kv_heads, p); }

template <class Void>
cuda::View<Void> view(const BasicTensor<Void>& tensor) {
  return {tensor.data, tensor.stride[0], tensor.stride[1]};
}

cuda::Slab slab_at(const cuda::Setup& setup, int head, int token) {
  return {head, std::min(setup.slab_heads, setup.shape.kv_heads - head), token,
          std::min(setup.slab_tokens, setup.shape.total_q - token)};
}

// The scratch memory as forward divides it.
struct Scratch {
  Scratch(const CudaBuffer& workspace, const cuda::Setup& setup)
      : carver(workspace.span().data()),
        batch(carver, setup.shape),
        slab(carver, setup, {0, setup.slab_heads, 0, setup.slab_tokens}) {}

  Carver carver;
  const cuda::BatchMemory batch;
  const cuda::SlabMemory slab;
};

}  // namespace

CudaWorkload::CudaWorkload(const CudaProblem& problem, cudaStream_t stream)
    : plan(problem.problem, problem.options),
      stream_(stream),
      q_(q_bytes(problem.problem)),
      k_(k_bytes(problem.problem)),
      v_(k_bytes(problem.problem)),
      out_(q_bytes(problem.problem)),
      lse_(static_cast<std::size_t>(problem.problem.total_q * problem.problem.q_heads) * sizeof(float)),
      starts_(problem.starts.size() * sizeof(std::int32_t)),
      workspace_(plan.workspace_bytes()),
      centroids_(bytes(plan.max_blocks(), problem.problem.kv_heads, problem.problem)),
      rotated_q_(problem.problem.rope ? q_bytes(problem.problem) : 0),
      rotated_k_(problem.problem.rope ? k_bytes(problem.problem) : 0) {
  const Problem& p = plan.problem();
  const Tensor q = tensor(q_, p.total_q, p.q_heads), k = tensor(k_, p.total_k, p.kv_heads),
               v = tensor(v_, p.total_k, p.kv_heads);
  fill_normal(q, 1, p.q_heads / p.kv_heads, problem.lean_q, stream_);
  fill_normal(k, 2, 1, problem.lean_k, stream_);
  fill_normal(v, 3, 1, {}, stream_);
  const std::vector<std::int32_t> starts(problem.starts.begin(), problem.starts.end());
  MOBA_CUDA(cudaMemcpy(starts_.data(), starts.data(), starts_.size(), cudaMemcpyHostToDevice));
  const ConstTensor cu_seqlens(starts_.data(), DType::i32, {p.batch + 1}, Device::cuda, plan.options().cuda_device);
  inputs_ = {q, k, v, cu_seqlens, cu_seqlens};
  outputs_ = {tensor(out_, p.total_q, p.q_heads),
              Tensor(lse_.data(), DType::f32, {p.q_heads, p.total_q}, Device::cuda, plan.options().cuda_device)};
}

Tensor CudaWorkload::tensor(const CudaBuffer& buffer, std::int64_t tokens, std::int64_t heads) const {
  const Problem& p = plan.problem();
  return Tensor(buffer.data(), p.dtype, {tokens, heads, p.head_dim}, Device::cuda, plan.options().cuda_device);
}

void CudaWorkload::forward(Marks& marks) {
  moba::forward(plan, inputs_, outputs_, workspace_.span(), {stream_});
  marks.mark("forward");
}

void CudaWorkload::dense(Marks& marks) {
  moba::dense(plan, inputs_, outputs_, workspace_.span(), {stream_});
  marks.mark("dense");
}

void CudaWorkload::rope(Marks& marks) {
  const Problem& p = plan.problem();
  moba::rope(plan, inputs_, tensor(rotated_q_, p.total_q, p.q_heads), tensor(rotated_k_, p.total_k, p.kv_heads),
             workspace_.span(), {stream_});
  marks.mark("rope");
}

void CudaWorkload::staged(Marks& marks) {
  const Problem& p = plan.problem();
  const cuda::Setup& setup = *plan.impl().cuda;
  const cuda::Shape& shape = setup.shape;
  const Scratch scratch(workspace_, setup);
  const cuda::SlabMemory& memory = scratch.slab;
  const cuda::Batch batch{scratch.batch.sequences, scratch.batch.blocks};
  const Tensor centroids = tensor(centroids_, plan.max_blocks(), p.kv_heads);
  const cuda::LseView lse{static_cast<float*>(lse_.data()), outputs_.lse.stride[0], outputs_.lse.stride[1]};
  const auto* const starts = static_cast<const std::int32_t*>(starts_.data());
  const auto gate = setup.gate == cuda::GateKernel::sm90 ? cuda::gate_sm90 : cuda::gate_portable;
  const auto attend = setup.attend == cuda::AttendKernel::resident_sm90 ? cuda::attend_resident_sm90
                      : setup.attend == cuda::AttendKernel::stream_sm90 ? cuda::attend_stream_sm90
                                                                        : cuda::attend_portable;

  cuda::prepare_batch(shape, starts, starts, p.max_seqlen_q, p.max_seqlen_k, false, scratch.batch.sequences,
                      scratch.batch.blocks, stream_);
  marks.mark("batch");
  cuda::pool(shape, batch, view(inputs_.k), view(centroids), stream_);
  marks.mark("pool");
  for (int head = 0; head < shape.kv_heads; head += setup.slab_heads) {
    for (int token = 0; token < shape.total_q; token += setup.slab_tokens) {
      const cuda::Slab slab = slab_at(setup, head, token);
      const std::int64_t row = shape.slots, rows_of_token = row * shape.group, rows = rows_of_token * slab.tokens;
      gate(shape, slab, batch, view(inputs_.q), view(ConstTensor(centroids)), {memory.ids, rows, rows_of_token, row},
           {}, stream_);
      marks.mark("gate");
      cuda::index(shape, slab, batch, {memory.ids, rows, rows_of_token, row}, {}, memory.index, nullptr,
                  memory.index_scratch, stream_);
      marks.mark("index");
      cuda::list_units(shape, slab, batch, memory.index, setup.rows_per_unit, memory.units, stream_);
      marks.mark("units");
      attend(shape, {view(inputs_.q), view(inputs_.k), view(inputs_.v), memory.index.rows}, memory.units,
             {memory.partials, {}, {}}, stream_);
      marks.mark("attend");
      cuda::merge(shape, slab, memory.index, memory.partials, view(outputs_.out), lse, stream_);
      marks.mark("merge");
    }
  }
}

Digest CudaWorkload::result() const {
  const Digest digest = digest_of(outputs_.out, stream_);
  if (digest.not_finite != 0) {
    throw std::runtime_error(std::to_string(digest.not_finite) + " elements of out are infinite or NaN");
  }
  return digest;
}

double CudaWorkload::longest_list() {
  const cuda::Setup& setup = *plan.impl().cuda;
  const cuda::Shape& shape = setup.shape;
  const cuda::Slab slab = slab_at(setup, (shape.kv_heads - 1) / setup.slab_heads * setup.slab_heads,
                                  (shape.total_q - 1) / setup.slab_tokens * setup.slab_tokens);
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(slab.heads) * static_cast<std::size_t>(shape.max_blocks) +
                                    1);
  MOBA_CUDA(cudaMemcpyAsync(offsets.data(), Scratch(workspace_, setup).slab.index.offsets,
                            offsets.size() * sizeof(std::int64_t), cudaMemcpyDeviceToHost, stream_));
  MOBA_CUDA(cudaStreamSynchronize(stream_));
  std::int64_t longest = 0;
  for (std::size_t i = 1; i < offsets.size(); ++i) longest = std::max(longest, offsets[i] - offsets[i - 1]);
  return static_cast<double>(longest) / (static_cast<double>(slab.tokens) * shape.group);
}

}  // namespace moba::bench
