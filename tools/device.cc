#include "device.h"

#include <algorithm>
#include <string>

#include "moba/error.h"
#include "text.h"

namespace moba::cli {
namespace {

[[noreturn]] void refuse(int device, const gpu::MemoryState& memory, double bytes, const std::string& what) {
  throw Error("GPU memory: " + format_bytes(bytes) + " are needed" + what + "; " + format_bytes(memory.free) + " of " +
              format_bytes(memory.total) + " are free on device " + std::to_string(device));
}

}  // namespace

Place::Place(const Plan& plan) {
  if (plan.options().backend != Backend::cuda) return;
  device = Device::cuda;
  index = plan.options().cuda_device;
}

PlacedMemory::PlacedMemory(Place place, std::size_t bytes, const char* what) : place_(place), size_(bytes) {
  if (place.device == Device::cpu) {
    host_ = Buffer(bytes);
    return;
  }
  // Not 0 bytes: a tensor without elements still has an address.
  gpu_ = {gpu::allocate(place.index, std::max<std::size_t>(1, bytes)), gpu::Release{place.index}};
  if (gpu_ == nullptr) {
    refuse(place.index, gpu::memory_state(place.index), static_cast<double>(bytes), std::string(" for ") + what);
  }
}

Tensor allocate(PlacedMemory& memory, Place place, DType dtype, std::initializer_list<std::int64_t> shape,
                const char* what) {
  Tensor tensor(nullptr, dtype, shape, place.device, place.index);
  memory = PlacedMemory(place, bytes_of(tensor), what);
  tensor.data = memory.span().data();
  return tensor;
}

PlacedTensor::PlacedTensor(Place place, const ConstTensor& host, const char* what) : tensor_(host) {
  if (place.device == Device::cpu || !host.given()) return;
  const std::size_t bytes = bytes_of(host);
  memory_ = PlacedMemory(place, bytes, what);
  gpu::copy_to_device(place.index, memory_.span().data(), host.data, bytes);
  tensor_.data = memory_.span().data();
  tensor_.device = place.device;
  tensor_.device_index = place.index;
}

PlacedInputs::PlacedInputs(const Plan& plan, const Inputs& host)
    : q_(Place(plan), host.q, "q"),
      k_(Place(plan), host.k, "k"),
      v_(Place(plan), host.v, "v"),
      cu_seqlens_q_(Place(plan), host.cu_seqlens_q, "cu_seqlens_q"),
      cu_seqlens_k_(Place(plan), host.cu_seqlens_k, "cu_seqlens_k"),
      inputs_{q_.tensor(), k_.tensor(), v_.tensor(), cu_seqlens_q_.tensor(), cu_seqlens_k_.tensor()} {}

OnHost::OnHost(const Tensor& tensor) : tensor_(tensor) {
  if (tensor.device == Device::cpu) return;
  memory_ = Buffer(bytes_of(tensor));
  gpu::copy_to_host(tensor.device_index, memory_.data(), tensor.data, memory_.size());
  tensor_.data = memory_.data();
  tensor_.device = Device::cpu;
  tensor_.device_index = 0;
}

Stopwatch::Stopwatch(const Plan& plan) {
  const Place place(plan);
  if (place.device == Device::cuda) gpu_ = std::make_unique<gpu::Marks>(place.index);
}

void Stopwatch::lap() {
  if (gpu_ != nullptr) return gpu_->set();
  host_.push_back(std::chrono::steady_clock::now());
}

std::vector<double> Stopwatch::seconds() {
  if (gpu_ != nullptr) return gpu_->seconds();
  std::vector<double> seconds;
  for (std::size_t i = 1; i < host_.size(); ++i) {
    seconds.push_back(std::chrono::duration<double>(host_[i] - host_[i - 1]).count());
  }
  return seconds;
}

void require_host(const Options& options, const char* reason) {
  if (options.backend == Backend::cuda) {
    throw Error(std::string("--backend: is cuda; allowed: cpu, reference: ") + reason);
  }
}

void require_gpu_memory(const Plan& plan, double bytes) {
  const int device = Place(plan).index;
  const gpu::MemoryState memory = gpu::memory_state(device);
  if (bytes <= memory.free) return;
  refuse(device, memory, bytes, " for the tensors and the workspace (--workspace-limit)");
}

}  // namespace moba::cli
