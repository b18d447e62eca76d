// What the cuda figures compute with: made on the device, looked at on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "moba/tensor.h"

namespace moba::bench {

// A direction that rows share, on top of their noise, so that they choose the same blocks.
struct Lean {
  float length = 0;                                                // of what is added to a row; 0: nothing
  std::int64_t tokens = std::numeric_limits<std::int64_t>::max();  // only the first of them lean
  std::int64_t topic_tokens = 0;  // after so many tokens the direction is drawn anew; 0: never
  int topics = 1;                 // from so many
};

// Fills a contiguous tensor [tokens, heads, d] of f16 or bf16, d even, with normal numbers: any element is a function
// of seed and place alone. Directions are those of a key head, which is heads / group of them.
void fill_normal(const Tensor& tensor, std::uint64_t seed, std::int64_t group, const Lean& lean, cudaStream_t stream);

// Equal bits give equal digests.
struct Digest {
  std::uint64_t bits = 0;
  std::uint64_t not_finite = 0;  // elements that are infinite or NaN

  bool operator==(const Digest&) const = default;
};

// Of a contiguous tensor of f16 or bf16 with an even number of elements. Waits for the stream.
Digest digest_of(const ConstTensor& tensor, cudaStream_t stream);

}  // namespace moba::bench
