// The grid of problems of the cuda tests: that of the cpu tests as far as the kernels go (16-bit types, six head dims,
// blocks that are multiples of 16, k up to 64, strides that are multiples of 8), and what meets every kernel.
#pragma once

#include <vector>

#include "support.h"

namespace moba::test {

inline constexpr DType kTypes[] = {DType::f16, DType::bf16};
inline constexpr std::int64_t kHeadDims[] = {32, 64, 96, 128, 192, 256};

// A few, tiny: what compute-sanitizer runs.
std::vector<Case> small_cases();
// Every head dim, block size, group, k, kind of lengths and of strides, causal and not.
std::vector<Case> grid_cases();
// 3000 sequences of up to 40 tokens, some empty: more than a CTA looks through at once.
Case many_sequences();
// Anything of the above, at random.
Case random_case(std::uint64_t seed);

// cu_seqlens that are not as they must be.
struct Lie {
  bool q;  // else k
  std::vector<std::int32_t> entries;

  void tell(Data& data) const;
};
// For q_lengths {60, 39} and k_lengths {75, 99}.
std::vector<Lie> tables_that_lie();

// Queries at positions before the first of a rope table of the caller's.
struct FewPositions {
  Array cos, sin;
  Case c;

  FewPositions();
};

}  // namespace moba::test
