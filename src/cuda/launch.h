// How the host calls CUDA: every call is checked, every kernel is launched here.
#pragma once

#include <cuda_runtime.h>

#include <source_location>
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
// The grid of a launch, and where in the source it was asked for.
struct Grid {
  dim3 size;
  std::source_location at;

  Grid(dim3 grid, std::source_location where = std::source_location::current()) : size(grid), at(where) {}
};

// Launches kernel<<<grid, threads, shared_bytes, stream>>>(arguments...). What fails is told by what the launch itself
// returns: cudaGetLastError() would also give errors that the caller left behind.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (grid.size.x == 0 || grid.size.y == 0 || grid.size.z == 0) return;
  const auto check = [&](cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail(error, what, grid.at.file_name(), static_cast<int>(grid.at.line()));
  };
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.size;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), grid.at.function_name());
}
#endif

}  // namespace moba::cuda
