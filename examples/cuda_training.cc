// A step of training on an NVIDIA GPU: forward keeps the ids of the blocks that it chose, all that backward needs of a
// selection there, and backward gives the gradients. Says so and ends well where there is no GPU.
#include <cuda_runtime_api.h>
#include <moba/moba.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t kTokens = 8192, kQueryHeads = 8, kKeyHeads = 2, kHeadDim = 128;
constexpr std::size_t kQueries = kTokens * kQueryHeads * kHeadDim, kKeys = kTokens * kKeyHeads * kHeadDim;
constexpr int kDevice = 0;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Memory of the current device.
using Memory = std::unique_ptr<std::byte, cudaError_t (*)(void*)>;
Memory allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return {static_cast<std::byte*>(memory), cudaFree};
}

// bf16 is the upper half of a float32.
using Values = std::vector<std::uint16_t>;
float to_float(std::uint16_t value) { return std::bit_cast<float>(std::uint32_t{value} << 16); }

Values made_up(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  Values values(size);
  for (std::uint16_t& value : values) {
    const float number = static_cast<float>(random()) * 0x1p-31f - 1.0f;
    value = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(number) >> 16);
  }
  return values;
}

Memory upload(const Values& values, cudaStream_t stream) {
  Memory memory = allocate(values.size() * sizeof values[0]);
  check(cudaMemcpyAsync(memory.get(), values.data(), values.size() * sizeof values[0], cudaMemcpyHostToDevice, stream));
  return memory;
}

moba::Tensor of_queries(const Memory& memory) {
  return {memory.get(), moba::DType::bf16, {kTokens, kQueryHeads, kHeadDim}, moba::Device::cuda, kDevice};
}
moba::Tensor of_keys(const Memory& memory) {
  return {memory.get(), moba::DType::bf16, {kTokens, kKeyHeads, kHeadDim}, moba::Device::cuda, kDevice};
}

// The weights of a row add up to 1. So does dv over all keys add up to dout over all rows, which here is all ones.
void check_values_gradient(const Values& dv) {
  const auto expected = static_cast<double>(kTokens * (kQueryHeads / kKeyHeads));
  for (std::size_t column = 0; column < kKeyHeads * kHeadDim; ++column) {
    double sum = 0;
    for (std::size_t i = column; i < dv.size(); i += kKeyHeads * kHeadDim) sum += static_cast<double>(to_float(dv[i]));
    if (!(std::abs(sum - expected) < 0.01 * expected)) throw std::runtime_error("dv does not add up to dout");
  }
}

void run() {
  moba::Problem problem;
  problem.dtype = moba::DType::bf16;
  problem.q_heads = kQueryHeads, problem.kv_heads = kKeyHeads, problem.head_dim = kHeadDim;
  problem.total_q = problem.total_k = kTokens;
  problem.config.block_size = 128, problem.config.top_k = 8;
  problem.rope = moba::Rope{};
  moba::Options options;
  options.backend = moba::Backend::cuda;
  options.cuda_device = kDevice;

  const moba::Plan plan(problem, options);
  // forward and backward work in the same memory, one after the other.
  const std::size_t workspace_bytes = std::max(plan.workspace_bytes(), plan.backward_workspace_bytes());
  std::printf("%s, workspace %zu MiB\n", plan.kernels().c_str(), workspace_bytes >> 20);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  const Memory q = upload(made_up(kQueries, 1), stream), k = upload(made_up(kKeys, 2), stream),
               v = upload(made_up(kKeys, 3), stream), dout = upload(Values(kQueries, 0x3f80), stream);
  const Memory out = allocate(kQueries * 2), lse = allocate(kTokens * kQueryHeads * sizeof(float));
  const Memory dq = allocate(kQueries * 2), dk = allocate(kKeys * 2), dv = allocate(kKeys * 2);
  const Memory ids = allocate(plan.ids_bytes());
  const Memory memory = allocate(workspace_bytes);
  const moba::Workspace workspace(memory.get(), workspace_bytes);

  moba::Inputs inputs;
  inputs.q = of_queries(q), inputs.k = of_keys(k), inputs.v = of_keys(v);
  moba::Outputs outputs;
  outputs.out = of_queries(out);
  outputs.lse = {lse.get(), moba::DType::f32, {kQueryHeads, kTokens}, moba::Device::cuda, kDevice};
  moba::Selection selection;
  selection.ids = {ids.get(), moba::DType::i32, {kTokens, kQueryHeads, plan.slots()}, moba::Device::cuda, kDevice};
  // Both put kernels on the stream and return. What makes dout of out goes on the stream between them.
  moba::forward(plan, inputs, selection, outputs, workspace, {stream});
  moba::backward(plan, inputs, selection, {outputs.out, outputs.lse}, of_queries(dout),
                 {of_queries(dq), of_keys(dk), of_keys(dv)}, workspace, {stream});

  Values gradient(kKeys);
  check(cudaMemcpyAsync(gradient.data(), dv.get(), kKeys * 2, cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaStreamDestroy(stream));
  check_values_gradient(gradient);
  std::printf("%lld tokens, dv adds up to dout\n", static_cast<long long>(kTokens));
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
