// How the host calls CUDA: every call is checked, every kernel is launched here.
#pragma once

#include <cuda_runtime.h>

#include <source_location>
#include <string>

#include "cuda/contract.h"
#include "moba/error.h"

namespace moba::cuda {

// Takes the error back, so that the caller's next call does not find it.
[[noreturn]] inline void fail(cudaError_t error, const char* what, const char* file, int line) {
  cudaGetLastError();
  throw Error(std::string("CUDA: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ") in " + what +
              ", " + file + ":" + std::to_string(line));
}

#define MOBA_CUDA(call)                                                                                 \
  do {                                                                                                  \
    const cudaError_t moba_cuda_error = (call);                                                         \
    if (moba_cuda_error != cudaSuccess) ::moba::cuda::fail(moba_cuda_error, #call, __FILE__, __LINE__); \
  } while (0)

#ifdef __CUDACC__  // host files use the rest
// The grid of a launch, and where in the source it was asked for.
struct Grid {
  dim3 size;
  std::source_location at;

  Grid(dim3 grid, std::source_location where = std::source_location::current()) : size(grid), at(where) {}
};

// Bytes that a CTA of the current device can have, its kernel's own included.
inline int most_shared_memory() {
  int device = 0, most = 0;
  MOBA_CUDA(cudaGetDevice(&device));
  MOBA_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return most;
}

// Lets a kernel have all the shared memory there is. Never less: the limit is the device's, and two threads may be
// about to launch the kernel with different needs.
template <class Kernel>
void allow_shared_memory(Kernel kernel) {
  cudaFuncAttributes attributes;
  MOBA_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  MOBA_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most_shared_memory() - static_cast<int>(attributes.sharedSizeBytes)));
}

// Whether the kernel's code is of a kind that has ptx::start_behind_previous() and ptx::end_behind_previous().
template <class Kernel>
bool can_start_early(Kernel kernel) {
  cudaFuncAttributes attributes;
  MOBA_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

// Launches kernel<<<grid, threads, shared_bytes, stream>>>(arguments...). What fails is told by what the launch itself
// returns: cudaGetLastError() would also give errors that the caller left behind.
//
// Start::early and Start::beside: from ptx::let_next_start() of the kernel before it on. A kernel that starts early
// begins with ptx::start_behind_previous(): only its launch is hidden. Kernels that run beside one another follow each
// other in the stream. The first is launched behind all, so that what was before is visible to all of them; each of the
// others ends by ptx::end_behind_previous(), so that who waits for the last has waited for all; and none touches what
// another of them writes.
//
// Two kinds of kernels lose by starting early, as measured on an H200 at 64K tokens, and are launched behind all: merge
// (forward takes 5 % longer) and those of which two CTAs stay on each multiprocessor (portable attend: 10 %).
template <class... Parameters, class... Arguments>
void launch(Start start, void (*kernel)(Parameters...), const Grid& grid, int threads, std::size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.size.x == 0 || grid.size.y == 0 || grid.size.z == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared_memory(kernel);
  cudaLaunchConfig_t config{};
  config.gridDim = grid.size;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (start != Start::behind && can_start_early(kernel)) config.attrs = &early, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    fail(error, "the launch of a kernel", grid.at.file_name(), static_cast<int>(grid.at.line()));
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  launch(Start::behind, kernel, grid, threads, shared_bytes, stream, arguments...);
}
#endif

}  // namespace moba::cuda
