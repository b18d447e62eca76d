// MoBA on an NVIDIA GPU: memory of the device, a stream, a workspace that is made once. Says so and ends well where
// there is no GPU.
#include <cuda_runtime_api.h>
#include <moba/moba.h>

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Memory of the current device.
std::unique_ptr<std::byte, cudaError_t (*)(void*)> allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return {static_cast<std::byte*>(memory), cudaFree};
}

void run() {
  const std::int64_t tokens = 16384, q_heads = 8, kv_heads = 2, d = 128;
  moba::Problem problem;
  problem.dtype = moba::DType::bf16;
  problem.q_heads = q_heads, problem.kv_heads = kv_heads, problem.head_dim = d;
  problem.total_q = problem.total_k = tokens;
  problem.config.block_size = 128, problem.config.top_k = 8;
  moba::Options options;
  options.backend = moba::Backend::cuda;
  options.workspace_limit = std::size_t{256} << 20;  // fewer bytes, more passes, the same result

  const moba::Plan plan(problem, options);
  std::printf("%s, workspace %zu MiB\n", plan.kernels().c_str(), plan.workspace_bytes() >> 20);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  // bf16 1.0, so that every output is 1.
  const std::vector<std::uint16_t> ones(static_cast<std::size_t>(tokens * q_heads * d), 0x3f80);
  const std::size_t q_bytes = ones.size() * 2, k_bytes = q_bytes / (q_heads / kv_heads);
  const auto q = allocate(q_bytes), k = allocate(k_bytes), v = allocate(k_bytes), out = allocate(q_bytes);
  const auto workspace = allocate(plan.workspace_bytes());
  for (const auto& [to, bytes] : {std::pair{q.get(), q_bytes}, {k.get(), k_bytes}, {v.get(), k_bytes}}) {
    check(cudaMemcpyAsync(to, ones.data(), bytes, cudaMemcpyHostToDevice, stream));
  }

  const auto tensor = [&](std::byte* data, std::int64_t heads) {
    return moba::Tensor(data, moba::DType::bf16, {tokens, heads, d}, moba::Device::cuda, options.cuda_device);
  };
  moba::Inputs inputs;
  inputs.q = tensor(q.get(), q_heads), inputs.k = tensor(k.get(), kv_heads), inputs.v = tensor(v.get(), kv_heads);
  moba::Outputs outputs;
  outputs.out = tensor(out.get(), q_heads);
  // Puts kernels on the stream and returns; may be captured in a graph.
  moba::forward(plan, inputs, outputs, {workspace.get(), plan.workspace_bytes()}, {stream});

  std::vector<std::uint16_t> result(ones.size());
  check(cudaMemcpyAsync(result.data(), out.get(), q_bytes, cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaStreamDestroy(stream));
  if (result != ones) throw std::runtime_error("an output is not 1");
  std::printf("%lld tokens, every output is 1\n", static_cast<long long>(tokens));
}

}  // namespace

int main() {
  try {
    if (const moba::CudaSupport cuda = moba::cuda_support(); cuda.devices.empty()) {
      std::printf("skipped: %s\n", cuda.problem.c_str());
      return 0;
    }
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
