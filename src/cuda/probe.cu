// Whether the kernels of this library were compiled for a device.
#include <cuda_runtime.h>

#include "cuda/device.h"

namespace moba::cuda {
namespace {

__global__ void probe() {}

}  // namespace

bool has_kernels_for_current_device() {
  cudaFuncAttributes attributes;
  const bool has = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  cudaGetLastError();  // not an error of whoever calls CUDA next
  return has;
}

}  // namespace moba::cuda
