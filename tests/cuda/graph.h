// Calls of the cuda backend as a graph that can be launched again and again.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

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

// A captured run of `resident` is played with other inputs in the same places, and gives what calls on them give.
// `run` puts a run on the stream.
template <class Resident, class Input, class Run>
void expect_replays(Resident& resident, const Input& first, const Input& second, cudaStream_t stream, const Run& run) {
  std::vector<decltype(resident.results(stream))> direct;
  for (const Input* input : {&first, &second}) {
    resident.upload(*input, stream);
    run();
    direct.push_back(resident.results(stream));
  }
  EXPECT_FALSE(direct[0] == direct[1]);
  const Graph graph(stream, run);
  for (int i = 0; i < 6; ++i) {
    resident.upload(i % 2 == 0 ? first : second, stream);
    graph.launch(stream);
    EXPECT_TRUE(resident.results(stream) == direct[i % 2]) << "replay " << i;
  }
}

}  // namespace moba::test
