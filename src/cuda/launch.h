// How the host calls CUDA: every call is checked, every kernel is launched here.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "moba/error.h"

namespace moba::cuda {

[[noreturn]] inline void fail(cudaError_t error, const char* what, const char* file, int line) {
  throw Error(std::string("CUDA: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ") in " + what +
              ", " + file + ":" + std::to_string(line));
}

#define MOBA_CUDA(call)                                                                                 \
  do {                                                                                                  \
    const cudaError_t moba_cuda_error = (call);                                                         \
    if (moba_cuda_error != cudaSuccess) ::moba::cuda::fail(moba_cuda_error, #call, __FILE__, __LINE__); \
  } while (0)

#ifdef __CUDACC__  // host files use the rest
// Launches kernel<<<grid, threads, shared_bytes, stream>>>(arguments...).
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    MOBA_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(arguments...);
  MOBA_CUDA(cudaGetLastError());
}
#endif

}  // namespace moba::cuda
