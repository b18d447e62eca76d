// What this build is and what this machine offers.
#pragma once

#include <string>
#include <vector>

#include "moba/export.h"

namespace moba {

// "0.1.0"
MOBA_EXPORT const char* version();

// Instruction sets of the cpu backend that this build holds and this machine can run, best first: "AVX3", "AVX2",
// "SSE4",
// ... Any of them may be forced through Options::cpu_target.
MOBA_EXPORT std::vector<std::string> cpu_targets();

// AVX512_BF16: whether the processor has pair products of bfloat16, and whether they are faster there than widening.
struct Bf16Support {
  bool available = false;
  bool preferred = false;
};
MOBA_EXPORT Bf16Support bf16_support();

}  // namespace moba
