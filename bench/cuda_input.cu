#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda_buffer.h"
#include "cuda_input.h"

namespace moba::bench {
namespace {

constexpr int kThreads = 256, kCtas = 2048;
constexpr std::uint64_t kTopicSeed = 3, kDirectionSeed = 5;

// The finalizer of SplitMix64 over a counter: passes for random as far as a benchmark is concerned.
__device__ std::uint64_t mix(std::uint64_t seed, std::uint64_t counter) {
  std::uint64_t x = counter + seed * 0x9e3779b97f4a7c15ull + 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Box and Muller: two normal numbers from 64 random bits.
__device__ float2 normal_pair(std::uint64_t bits) {
  const float radius_bits = (static_cast<float>(bits >> 40) + 1.0f) * 0x1p-24f;  // (0, 1]
  const float turn = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
  const float radius = sqrtf(-2.0f * logf(radius_bits));
  float sine, cosine;
  sincospif(2.0f * turn, &sine, &cosine);
  return {radius * cosine, radius * sine};
}

struct Layout {
  std::int64_t pairs;  // of elements
  int heads, head_dim, group;
};

template <class T>
__global__ void fill(T* out, Layout layout, std::uint64_t seed, Lean lean) {
  const float step = lean.length * rsqrtf(static_cast<float>(layout.head_dim));
  const std::int64_t pairs_per_row = layout.head_dim / 2;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < layout.pairs; i += kThreads * kCtas) {
    float2 value = normal_pair(mix(seed, static_cast<std::uint64_t>(i)));
    const std::int64_t row = i / pairs_per_row, token = row / layout.heads;
    if (step != 0 && token < lean.tokens) {
      const std::uint64_t topic =
          lean.topic_tokens == 0 ? 0
                                 : mix(kTopicSeed, static_cast<std::uint64_t>(token / lean.topic_tokens)) % lean.topics;
      const std::int64_t key_head = row % layout.heads / layout.group;
      const std::uint64_t place =
          (topic << 32) + static_cast<std::uint64_t>(key_head * pairs_per_row + i % pairs_per_row);
      const std::uint64_t signs = mix(kDirectionSeed, place);
      value.x += signs & 1 ? step : -step;
      value.y += signs & 2 ? step : -step;
    }
    out[2 * i] = static_cast<T>(value.x);
    out[2 * i + 1] = static_cast<T>(value.y);
  }
}

__global__ void digest(const std::uint32_t* words, std::int64_t count, std::uint32_t exponent, Digest* sum) {
  unsigned long long bits = 0, not_finite = 0;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += kThreads * kCtas) {
    const std::uint32_t word = words[i], high = exponent << 16;
    bits += mix(word, static_cast<std::uint64_t>(i));
    not_finite += ((word & exponent) == exponent) + ((word & high) == high);
  }
  // Sums of integers: the order in which they are added does not show.
  atomicAdd(reinterpret_cast<unsigned long long*>(&sum->bits), bits);
  if (not_finite != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&sum->not_finite), not_finite);
}

std::int64_t elements(const ConstTensor& tensor) { return tensor.shape[0] * tensor.shape[1] * tensor.shape[2]; }

}  // namespace

void fill_normal(const Tensor& tensor, std::uint64_t seed, std::int64_t group, const Lean& lean, cudaStream_t stream) {
  const Layout layout{elements(tensor) / 2, static_cast<int>(tensor.shape[1]), static_cast<int>(tensor.shape[2]),
                      static_cast<int>(group)};
  if (tensor.dtype == DType::bf16) {
    cuda::launch(fill<__nv_bfloat16>, dim3(kCtas), kThreads, 0, stream, static_cast<__nv_bfloat16*>(tensor.data),
                 layout, seed, lean);
  } else {
    cuda::launch(fill<__half>, dim3(kCtas), kThreads, 0, stream, static_cast<__half*>(tensor.data), layout, seed, lean);
  }
}

Digest digest_of(const ConstTensor& tensor, cudaStream_t stream) {
  const CudaBuffer memory(sizeof(Digest));
  MOBA_CUDA(cudaMemsetAsync(memory.data(), 0, sizeof(Digest), stream));
  const std::uint32_t exponent = tensor.dtype == DType::bf16 ? 0x7f80 : 0x7c00;
  cuda::launch(digest, dim3(kCtas), kThreads, 0, stream, static_cast<const std::uint32_t*>(tensor.data),
               elements(tensor) / 2, exponent, static_cast<Digest*>(memory.data()));
  Digest result;
  MOBA_CUDA(cudaMemcpyAsync(&result, memory.data(), sizeof result, cudaMemcpyDeviceToHost, stream));
  MOBA_CUDA(cudaStreamSynchronize(stream));
  return result;
}

}  // namespace moba::bench
