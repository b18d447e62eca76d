// A problem of the cuda figures with its memory, ready to run on a stream.
#pragma once

#include <cuda_runtime_api.h>

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

  // forward without rope, with a mark behind each of its stages: batch, pool, gate, index, units, attend, merge. Those
  // of the public face would not tell the last three apart.
  void staged(Marks& marks);

  // Of `out`. Throws std::runtime_error where it is not finite.
  Digest result() const;

  // Behind staged(): rows of the longest list, as a share of the rows that it could hold. Of the last slab.
  double longest_list();

  const Plan plan;

 private:
  Tensor tensor(const CudaBuffer& buffer, std::int64_t tokens, std::int64_t heads) const;

  cudaStream_t stream_;
  CudaBuffer q_, k_, v_, out_, lse_, starts_, workspace_;
  CudaBuffer centroids_;              // staged
  CudaBuffer rotated_q_, rotated_k_;  // rope
  Inputs inputs_;
  Outputs outputs_;
};

}  // namespace moba::bench
