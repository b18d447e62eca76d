#include "cuda/device.h"

#include <algorithm>
#include <charconv>

#include "cuda/backend.h"
#include "cuda/launch.h"
#include "refuse.h"

namespace moba::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Devices that the driver lists, or what stands in the way. Leaves no error behind for the caller's own CUDA calls.
int count_devices(std::string& problem) {
  int driver = 0, count = 0;
  const int runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    problem = "no NVIDIA driver is installed";
  } else if (driver / 1000 < runtime / 1000) {
    problem = "the NVIDIA driver is too old: it serves CUDA " + version_text(driver) + ", this library needs " +
              std::to_string(runtime / 1000) + ".0";
  } else if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    cudaGetLastError();  // not an error of whoever calls CUDA next
    problem = std::string("no GPU can be used: ") + cudaGetErrorString(error);
    count = 0;
  } else if (count == 0) {
    problem = "the NVIDIA driver lists no GPU";
  }
  return count;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  MOBA_CUDA(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

DeviceLimits limits_of(int index) {
  DeviceLimits limits;
  cudaDeviceProp properties;
  MOBA_CUDA(cudaGetDeviceProperties(&properties, index));
  limits.index = index;
  limits.name = properties.name;
  limits.memory = properties.totalGlobalMem;
  limits.major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  limits.minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
  return limits;
}

std::string unfit(const DeviceLimits& limits) {
  const std::string is =
      limits.name + ", compute capability " + std::to_string(limits.major) + "." + std::to_string(limits.minor);
  if (limits.major < 8) return is + "; allowed: devices of compute capability 8.0 or later";
  if (!is_built_for(limits.major, limits.minor, MOBA_CUDA_TARGETS)) {
    return is + ", which this library was not built for (MOBA_CUDA_ARCHITECTURES is " + MOBA_CUDA_TARGETS + ")";
  }
  return {};
}

}  // namespace

bool is_built_for(int major, int minor, std::string_view targets) {
  const int device = major * 10 + minor;
  while (!targets.empty()) {
    const std::string_view target = targets.substr(0, targets.find(' '));
    targets.remove_prefix(std::min(targets.size(), target.size() + 1));
    int arch = 0;
    const auto [end, error] = std::from_chars(target.data(), target.data() + target.size(), arch);
    if (error != std::errc()) return true;  // "native", "all": nothing to compare with
    const std::string_view kind(end, static_cast<std::size_t>(target.data() + target.size() - end));
    if (kind != "-virtual" && arch / 10 == major && arch <= device) return true;  // machine code
    if (kind != "-real" && arch <= device) return true;                           // PTX
  }
  return false;
}

CurrentDevice::CurrentDevice(int index) {
  MOBA_CUDA(cudaGetDevice(&before_));
  changed_ = before_ != index;
  if (changed_) MOBA_CUDA(cudaSetDevice(index));
}

CurrentDevice::~CurrentDevice() {
  if (changed_) cudaSetDevice(before_);
}

void check_device(int device) {
  std::string problem;
  const int count = count_devices(problem);
  if (!problem.empty()) refuse("options.backend", "cuda, but " + problem, "cpu, reference here");
  check_range("options.cuda_device", device, 0, count - 1);
}

DeviceLimits device_limits(int index) {
  DeviceLimits limits = limits_of(index);
  const std::string problem = unfit(limits);
  if (!problem.empty()) throw Error("options.cuda_device: is " + std::to_string(index) + ", " + problem);
  return limits;
}

CudaSupport support() {
  CudaSupport support;
  support.built = true;
  support.runtime = version_text(CUDART_VERSION);
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) support.driver = version_text(driver);
  const int count = count_devices(support.problem);
  for (int i = 0; i < count; ++i) {
    std::string problem;
    try {
      const DeviceLimits limits = limits_of(i);
      problem = unfit(limits);
      if (problem.empty()) {
        support.devices.push_back(
            {i, limits.name, limits.major, limits.minor, limits.memory, limits.has_sm90() ? "sm90" : "portable"});
      }
    } catch (const Error& error) {  // taken by somebody else, or broken: the others may be usable
      problem = error.what();
    }
    if (!problem.empty() && support.problem.empty()) {
      support.problem = "device " + std::to_string(i) + " is " + problem;
    }
  }
  if (!support.devices.empty()) support.problem.clear();
  return support;
}

int device_of(const void* pointer) {
  cudaPointerAttributes attributes;
  const cudaError_t error = cudaPointerGetAttributes(&attributes, pointer);
  if (error == cudaErrorInvalidValue) {  // memory that CUDA does not know
    cudaGetLastError();
    return -1;
  }
  if (error != cudaSuccess) fail(error, "a look at a pointer, if not in an earlier kernel", __FILE__, __LINE__);
  const bool on_device = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return on_device ? attributes.device : -1;
}

}  // namespace moba::cuda
