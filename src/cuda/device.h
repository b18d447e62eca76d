// The GPUs of this machine, as far as the backend needs to know them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "moba/info.h"

namespace moba::cuda {

// What the choice of kernels depends on. Made by hand in tests: the choice needs no device.
struct DeviceLimits {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int sm_count = 1;
  std::size_t memory = 0;  // bytes

  bool has_sm90() const { return major == 9 && minor == 0; }  // what is compiled for sm_90a runs there and nowhere else
};

// A device that check_device (backend.h) lets pass, or moba::Error if there are no kernels for it.
DeviceLimits device_limits(int index);

// Makes `index` the current device as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Whether kernels compiled for `targets` (as MOBA_CUDA_ARCHITECTURES, separated by spaces) run on a device of this
// compute capability. Asked without touching the device, which would take memory on it.
bool is_built_for(int major, int minor, std::string_view targets);

}  // namespace moba::cuda
