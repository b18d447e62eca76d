// Memory of the current device, freed at the end of the scope.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "cuda/launch.h"

namespace moba::bench {

class CudaBuffer {
 public:
  explicit CudaBuffer(std::size_t bytes) : bytes_(bytes) { MOBA_CUDA(cudaMalloc(&data_, bytes > 0 ? bytes : 1)); }
  ~CudaBuffer() { cudaFree(data_); }
  CudaBuffer(const CudaBuffer&) = delete;
  CudaBuffer& operator=(const CudaBuffer&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> span() const { return {static_cast<std::byte*>(data_), bytes_}; }

 private:
  std::size_t bytes_;
  void* data_ = nullptr;
};

}  // namespace moba::bench
