// A problem of the cuda figures with its memory, ready to run on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"
#include "cuda_buffer.h"
#include "cuda_problems.h"
#include "cuda_timing.h"
#include "moba/moba.h"

namespace moba::bench {

class CudaWorkload {
 public:
  CudaWorkload(const CudaProblem& problem, cudaStream_t stream);

  // Each marks what it gave to the stream as one stage, by its own name.
  void forward(Marks& marks);
  void dense(Marks& marks);
  void rope(Marks& marks);

  // forward that keeps its selection, then backward; the latter alone, behind the former; and that of full attention,
  // behind dense().
  void training(Marks& marks);
  void backward(Marks& marks);
  void dense_backward(Marks& marks);

  // backward with a mark behind each of its stages (cuda/backend.h). Not with a rope.
  void staged_backward(Marks& marks);

  // forward without rope, with a mark behind each of its stages: batch, pool, gate, index, units, attend, merge. Those
  // of the public face would not tell the last three apart.
  void staged(Marks& marks);

  // Of `out`, of dq, dk and dv together. Throw std::runtime_error where anything is not finite.
  Digest result() const;
  Digest gradients() const;

  // Bytes that a forward and a backward pass take at most beyond their inputs and results: the selection, and the
  // workspace of either.
  std::size_t training_bytes() const;

  // Behind staged(): rows of the longest list, as a share of the rows that it could hold. Of the last slab.
  double longest_list();

  const Plan plan;

 private:
  Tensor tensor(const CudaBuffer& buffer, std::int64_t tokens, std::int64_t heads) const;
  Tensor dout() const { return tensor(dout_, plan.problem().total_q, plan.problem().q_heads); }
  Call call_with(const CudaBuffer& workspace, std::size_t scratch_bytes) const;

  cudaStream_t stream_;
  CudaBuffer q_, k_, v_, out_, lse_, starts_, workspace_;
  CudaBuffer centroids_;              // staged
  CudaBuffer rotated_q_, rotated_k_;  // rope
  CudaBuffer dout_, dq_, dk_, dv_, ids_, backward_workspace_;
  Selection selection_;  // ids alone, all that backward needs
  Gradients gradients_;
  Inputs inputs_;
  Outputs outputs_;
};

}  // namespace moba::bench
