// What this build is and what this machine offers.
#pragma once

#include <cstddef>
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

// A GPU that the cuda backend can use.
struct CudaDevice {
  int index = 0;             // as cudaSetDevice counts
  std::string name;          // "NVIDIA H200"
  int major = 0, minor = 0;  // compute capability
  std::size_t memory = 0;    // bytes
  std::string kernels;       // the family that a plan takes there: "sm90" or "portable"
};

// What the cuda backend can do here. Never throws for a missing GPU, driver or build: `problem` says what is missing.
struct CudaSupport {
  bool built = false;               // the library was built with CUDA
  std::string runtime, driver;      // CUDA versions, "13.0"; empty where there is none
  std::vector<CudaDevice> devices;  // those that can be used
  std::string problem;              // empty where there is a device
};
MOBA_EXPORT CudaSupport cuda_support();

}  // namespace moba
