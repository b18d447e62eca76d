// Random tensors for measurements.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "moba/attention.h"
#include "moba/plan.h"

namespace moba::cli {

// A tensor [tokens, heads, d] with entries of mean 0 and variance 1, nearly normal; the same for the same seed
// everywhere.
ConstTensor random_tensor(Buffer& memory, DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t d,
                          std::uint64_t seed);

// Such q, k and v. Sequences start at the given offsets.
struct RandomInputs {
  RandomInputs(const Problem& problem, const std::vector<std::int64_t>& starts_q,
               const std::vector<std::int64_t>& starts_k, std::uint64_t seed);

  Buffer q, k, v, cu_seqlens_q, cu_seqlens_k;
  Inputs inputs;  // views of the above
};

}  // namespace moba::cli
