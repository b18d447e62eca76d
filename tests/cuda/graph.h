// Calls of the cuda backend as a graph that can be launched again and again.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "cuda/launch.h"

namespace moba::test {

class Graph {
 public:
  // Captures what `work` puts on the stream.
  Graph(cudaStream_t stream, const std::function<void()>& work) {
    MOBA_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    work();
    MOBA_CUDA(cudaStreamEndCapture(stream, &graph_));
    MOBA_CUDA(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { MOBA_CUDA(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace moba::test
