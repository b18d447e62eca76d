// Device copies of the host tensors of one call, each with its gaps and with guards around it, so that what the tests
// know of host memory - all that is not an element holds 0xff bytes - holds on the device too.
//
// MOBA_CUDA_CHECKER=1 in the environment is for runs under compute-sanitizer: tensors and workspaces then end where
// their memory does, and a workspace is new for each call and never written before, so that memcheck and initcheck see
// more.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <list>
#include <span>
#include <string>
#include <vector>

#include "support.h"

namespace moba::test {

bool under_checker();

// Memory of the current device, freed with it.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::span<std::byte> bytes() const { return {data_, size_}; }
  void poison(cudaStream_t stream) const;  // 0xff

 private:
  std::byte* data_ = nullptr;
  std::size_t size_;
};

// A device tensor with the strides of a host tensor, and its alignment up to 64 bytes.
class DeviceTensor {
 public:
  explicit DeviceTensor(const ConstTensor& host);

  Tensor tensor() const { return view_; }
  // Elements and gaps; `host` is where the first element lies.
  void upload(const void* host, cudaStream_t stream) const;
  void download(void* host, cudaStream_t stream) const;
  // Once the stream is done: whether the device holds what the host holds, and whether the guards hold what they did.
  bool equals(const void* host) const;
  bool guards_untouched() const;

 private:
  std::size_t front_, bytes_;
  DeviceMemory memory_;
  Tensor view_;
};

// The arguments of one call: read() and write() give the device's views of host tensors; finish() waits for the stream,
// brings back what was written, and fails the test where memory was written that is no output.
class Mirror {
 public:
  explicit Mirror(cudaStream_t stream) : stream_(stream) {}

  ConstTensor read(const ConstTensor& host, const std::string& name);
  Tensor write(const Tensor& host, const std::string& name);
  Inputs read(const Inputs& host);
  Outputs write(const Outputs& host);
  ConstOutputs read(const ConstOutputs& host);
  Gradients write(const Gradients& host);
  Selection read(const Selection& host);
  Selection write(const Selection& host);
  void finish();

 private:
  struct Argument {
    std::string name;
    bool written;
    void* host;
    DeviceTensor device;

    Argument(std::string argument_name, bool is_written, const ConstTensor& tensor)
        : name(std::move(argument_name)), written(is_written), host(const_cast<void*>(tensor.data)), device(tensor) {}
  };
  Tensor add(const ConstTensor& host, const std::string& name, bool written);

  cudaStream_t stream_;
  std::list<Argument> arguments_;
};

}  // namespace moba::test
