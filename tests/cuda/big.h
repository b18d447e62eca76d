// Problems with tensors of more than 2^31 elements. They repeat a pattern of some thousand tokens, so that the host
// knows every element.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"
#include "cuda_test.h"

namespace moba::test {

inline constexpr std::int64_t kDim = 128;

// Tokens [tokens, heads, 128] of bf16 on the device; token t is token t % period of the pattern.
class Repeated {
 public:
  Repeated(std::int64_t tokens, std::int64_t heads, std::int64_t period, std::uint64_t seed, float mean);
  const std::uint16_t* row(std::int64_t token, std::int64_t head) const {
    return &pattern_[static_cast<std::size_t>((token % period_ * heads_ + head) * kDim)];
  }
  float get(std::int64_t token, std::int64_t head, std::int64_t x) const { return bf16_to_float(row(token, head)[x]); }
  Tensor tensor() const;

 private:
  std::int64_t tokens_, heads_, period_;
  std::vector<std::uint16_t> pattern_;
  DeviceMemory memory_;
};

template <class T>
std::vector<T> download(const Tensor& t, std::int64_t first, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  MOBA_CUDA(cudaMemcpy(values.data(), static_cast<const T*>(t.data) + first, values.size() * sizeof(T),
                       cudaMemcpyDeviceToHost));
  return values;
}

// Elements of a bf16 tensor of the device that are infinite or NaN, as poison is.
std::int64_t count_not_finite(const Tensor& t);

struct Big {
  std::int64_t q_tokens, k_tokens, q_heads, kv_heads, block_size, top_k;

  Problem problem() const;
  std::int64_t blocks() const { return (k_tokens + block_size - 1) / block_size; }
};

struct Tensors {
  Repeated q, k, v;
  explicit Tensors(const Big& b, std::int64_t q_period = 4001, std::int64_t k_period = 20011);
};

// Tokens of [tokens, heads, 128] where wrapped offsets would show, and those at both ends.
std::vector<std::int64_t> sampled_tokens(std::int64_t tokens, std::int64_t heads);

class CudaBig : public CudaTest {
 protected:
  // Whether the device has as much memory free.
  bool fits(std::size_t bytes);
};

}  // namespace moba::test
