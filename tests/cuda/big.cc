#include "big.h"

#include <algorithm>
#include <atomic>

namespace moba::test {

namespace {

// Host memory of bf16 that the device copies to many times faster than to any other.
class PinnedMemory {
 public:
  explicit PinnedMemory(std::int64_t count) {
    MOBA_CUDA(cudaMallocHost(reinterpret_cast<void**>(&data_), static_cast<std::size_t>(count) * 2));
  }
  ~PinnedMemory() { cudaFreeHost(data_); }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  std::uint16_t* data() const { return data_; }

 private:
  std::uint16_t* data_ = nullptr;
};

std::int64_t count_not_finite(const std::uint16_t* values, std::int64_t count) {
  constexpr std::int64_t kSlice = std::int64_t{1} << 21;
  std::atomic<std::int64_t> bad = 0;
  in_parallel(static_cast<std::size_t>((count + kSlice - 1) / kSlice), [&](std::size_t i) {
    const std::uint16_t* const first = values + static_cast<std::int64_t>(i) * kSlice;
    const std::uint16_t* const last = std::min(first + kSlice, values + count);
    bad += std::count_if(first, last, [](std::uint16_t x) { return (x & 0x7f80) == 0x7f80; });
  });
  return bad;
}

}  // namespace

Repeated::Repeated(std::int64_t tokens, std::int64_t heads, std::int64_t period, std::uint64_t seed, float mean)
    : tokens_(tokens),
      heads_(heads),
      period_(period),
      pattern_(static_cast<std::size_t>(period * heads * kDim)),
      memory_(static_cast<std::size_t>(tokens * heads * kDim) * 2) {
  in_parallel(static_cast<std::size_t>(period), [&](std::size_t token) {
    Random random(seed * 1'000'003 + token);
    const std::size_t row = static_cast<std::size_t>(heads * kDim);
    for (std::size_t i = token * row; i < (token + 1) * row; ++i) pattern_[i] = float_to_bf16(mean + random.uniform());
  });
  std::size_t filled = std::min(pattern_.size() * 2, memory_.size());
  MOBA_CUDA(cudaMemcpy(memory_.data(), pattern_.data(), filled, cudaMemcpyHostToDevice));
  while (filled < memory_.size()) {
    const std::size_t more = std::min(filled, memory_.size() - filled);
    MOBA_CUDA(cudaMemcpy(memory_.data() + filled, memory_.data(), more, cudaMemcpyDeviceToDevice));
    filled += more;
  }
  MOBA_CUDA(cudaDeviceSynchronize());
}

Tensor Repeated::tensor() const {
  return Tensor(memory_.data(), DType::bf16, {tokens_, heads_, kDim}, Device::cuda, device().index);
}

std::int64_t count_not_finite(const Tensor& t) {
  constexpr std::int64_t kPart = std::int64_t{1} << 26;
  const std::int64_t count = t.shape[0] * t.shape[1] * t.shape[2];
  const PinnedMemory part(std::min(kPart, count));
  std::int64_t bad = 0;
  for (std::int64_t first = 0; first < count; first += kPart) {
    const std::int64_t size = std::min(kPart, count - first);
    MOBA_CUDA(cudaMemcpy(part.data(), static_cast<const std::uint16_t*>(t.data) + first,
                         static_cast<std::size_t>(size) * 2, cudaMemcpyDeviceToHost));
    bad += count_not_finite(part.data(), size);
  }
  return bad;
}

Problem Big::problem() const {
  Problem p;
  p.dtype = DType::bf16;
  p.q_heads = q_heads, p.kv_heads = kv_heads, p.head_dim = kDim;
  p.total_q = q_tokens, p.total_k = k_tokens;
  p.config = {.block_size = block_size, .top_k = top_k};
  return p;
}

Tensors::Tensors(const Big& b, std::int64_t q_period, std::int64_t k_period)
    : q(b.q_tokens, b.q_heads, q_period, run_seed(), 0),
      k(b.k_tokens, b.kv_heads, k_period, run_seed() + 1, 0),
      v(b.k_tokens, b.kv_heads, k_period, run_seed() + 2, 0.25f) {}

std::vector<std::int64_t> sampled_tokens(std::int64_t tokens, std::int64_t heads) {
  std::vector<std::int64_t> sampled{0, 1, 777, tokens / 2, tokens - 2, tokens - 1};
  for (const int bits : {30, 31}) {
    const std::int64_t edge = (std::int64_t{1} << bits) / (heads * kDim);
    for (std::int64_t t = edge - 1; t <= edge + 1; ++t) sampled.push_back(t);
  }
  std::erase_if(sampled, [&](std::int64_t t) { return t < 0 || t >= tokens; });
  return sampled;
}

bool CudaBig::fits(std::size_t bytes) {
  std::size_t free = 0, total = 0;
  MOBA_CUDA(cudaMemGetInfo(&free, &total));
  return free > bytes;
}

}  // namespace moba::test
