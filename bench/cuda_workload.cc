#include "cuda_workload.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/backend.h"
#include "cuda/setup.h"

namespace moba::bench {

namespace {

constexpr std::size_t kElement = 2;  // bytes, f16 and bf16

std::size_t bytes(std::int64_t tokens, std::int64_t heads, const Problem& problem) {
  return kElement * static_cast<std::size_t>(tokens * heads * problem.head_dim);
}
std::size_t q_bytes(const Problem& p) { return bytes(p.total_q, p.q_heads, p); }
std::size_t k_bytes(const Problem& p) { return bytes(p.total_k, p.kv_heads, p); }

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
      rotated_k_(problem.problem.rope ? k_bytes(problem.problem) : 0),
      dout_(q_bytes(problem.problem)),
      dq_(q_bytes(problem.problem)),
      dk_(k_bytes(problem.problem)),
      dv_(k_bytes(problem.problem)),
      ids_(plan.ids_bytes()),
      backward_workspace_(plan.backward_workspace_bytes()) {
  const Problem& p = plan.problem();
  const Tensor q = tensor(q_, p.total_q, p.q_heads), k = tensor(k_, p.total_k, p.kv_heads),
               v = tensor(v_, p.total_k, p.kv_heads);
  fill_normal(q, 1, p.q_heads / p.kv_heads, problem.lean_q, stream_);
  fill_normal(k, 2, 1, problem.lean_k, stream_);
  fill_normal(v, 3, 1, {}, stream_);
  fill_normal(tensor(dout_, p.total_q, p.q_heads), 4, 1, {}, stream_);
  const std::vector<std::int32_t> starts(problem.starts.begin(), problem.starts.end());
  MOBA_CUDA(cudaMemcpy(starts_.data(), starts.data(), starts_.size(), cudaMemcpyHostToDevice));
  const ConstTensor cu_seqlens(starts_.data(), DType::i32, {p.batch + 1}, Device::cuda, plan.options().cuda_device);
  inputs_ = {q, k, v, cu_seqlens, cu_seqlens};
  outputs_ = {tensor(out_, p.total_q, p.q_heads),
              Tensor(lse_.data(), DType::f32, {p.q_heads, p.total_q}, Device::cuda, plan.options().cuda_device)};
  selection_.ids =
      Tensor(ids_.data(), DType::i32, {p.total_q, p.q_heads, plan.slots()}, Device::cuda, plan.options().cuda_device);
  gradients_ = {tensor(dq_, p.total_q, p.q_heads), tensor(dk_, p.total_k, p.kv_heads),
                tensor(dv_, p.total_k, p.kv_heads)};
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

void CudaWorkload::training(Marks& marks) {
  moba::forward(plan, inputs_, selection_, outputs_, workspace_.span(), {stream_});
  moba::backward(plan, inputs_, selection_, {outputs_.out, outputs_.lse}, dout(), gradients_,
                 backward_workspace_.span(), {stream_});
  marks.mark("training");
}

void CudaWorkload::backward(Marks& marks) {
  moba::backward(plan, inputs_, selection_, {outputs_.out, outputs_.lse}, dout(), gradients_,
                 backward_workspace_.span(), {stream_});
  marks.mark("backward");
}

void CudaWorkload::dense_backward(Marks& marks) {
  moba::dense_backward(plan, inputs_, {outputs_.out, outputs_.lse}, dout(), gradients_, backward_workspace_.span(),
                       {stream_});
  marks.mark("dense_backward");
}

void CudaWorkload::staged_backward(Marks& marks) {
  const Plan::Impl& impl = plan.impl();
  const Call call = call_with(backward_workspace_, impl.backward_scratch_bytes);
  cuda::backward_by_stages(call, selection_, {outputs_.out, outputs_.lse, dout()}, gradients_,
                           [&](const char* stage) { marks.mark(stage); });
}

void CudaWorkload::rope(Marks& marks) {
  const Problem& p = plan.problem();
  moba::rope(plan, inputs_, tensor(rotated_q_, p.total_q, p.q_heads), tensor(rotated_k_, p.total_k, p.kv_heads),
             workspace_.span(), {stream_});
  marks.mark("rope");
}

Call CudaWorkload::call_with(const CudaBuffer& workspace, std::size_t scratch_bytes) const {
  return {plan.impl(),
          inputs_.q,
          inputs_.k,
          inputs_.v,
          {},
          inputs_.cu_seqlens_q,
          inputs_.cu_seqlens_k,
          from_aligned(workspace.span()).first(scratch_bytes),
          {stream_}};
}

void CudaWorkload::staged(Marks& marks) {
  const Problem& p = plan.problem();
  const Call call = call_with(workspace_, plan.impl().scratch_bytes);
  Intermediates memory{};
  memory.centroids = tensor(centroids_, plan.max_blocks(), p.kv_heads);
  cuda::forward_by_stages(call, memory, outputs_, [&](const char* stage) { marks.mark(stage); });
}

namespace {

Digest finite_digest(const ConstTensor& tensor, const char* name, cudaStream_t stream) {
  const Digest digest = digest_of(tensor, stream);
  if (digest.not_finite != 0) {
    throw std::runtime_error(std::to_string(digest.not_finite) + " elements of " + name + " are infinite or NaN");
  }
  return digest;
}

}  // namespace

Digest CudaWorkload::result() const { return finite_digest(outputs_.out, "out", stream_); }

Digest CudaWorkload::gradients() const {
  Digest all;
  for (const auto& [tensor, name] :
       {std::pair{gradients_.dq, "dq"}, std::pair{gradients_.dk, "dk"}, std::pair{gradients_.dv, "dv"}}) {
    all.bits = all.bits * 31 + finite_digest(tensor, name, stream_).bits;
  }
  return all;
}

std::size_t CudaWorkload::training_bytes() const {
  return plan.ids_bytes() + std::max(plan.workspace_bytes(), plan.backward_workspace_bytes());
}

double CudaWorkload::longest_list() {
  const cuda::Setup& setup = *plan.impl().cuda;
  const cuda::Shape& shape = setup.shape;
  // Of the last slab, and so the first key heads of the slab's memory.
  const int heads = (shape.kv_heads - 1) % setup.slab_heads + 1, tokens = (shape.total_q - 1) % setup.slab_tokens + 1;
  Carver carver(from_aligned(workspace_.span()).data());
  const cuda::BatchMemory batch(carver, shape);
  const cuda::RopeMemory rope(carver, setup);
  const cuda::SlabMemory slab(carver, setup, {0, setup.slab_heads, 0, setup.slab_tokens});
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(heads) * static_cast<std::size_t>(shape.max_blocks) + 1);
  MOBA_CUDA(cudaMemcpyAsync(offsets.data(), slab.index.offsets, offsets.size() * sizeof(std::int64_t),
                            cudaMemcpyDeviceToHost, stream_));
  MOBA_CUDA(cudaStreamSynchronize(stream_));
  std::int64_t longest = 0;
  for (std::size_t i = 1; i < offsets.size(); ++i) longest = std::max(longest, offsets[i] - offsets[i - 1]);
  return static_cast<double>(longest) / (static_cast<double>(tokens) * shape.group);
}

}  // namespace moba::bench
