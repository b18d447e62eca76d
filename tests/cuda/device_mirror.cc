#include "device_mirror.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "cuda/launch.h"

namespace moba::test {

namespace {

constexpr std::size_t kGuard = 256;
constexpr std::byte kPattern{0xff};

// Bytes from the first element to the end of the last.
std::size_t extent(const ConstTensor& t) {
  std::int64_t last = 0;
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] == 0) return 0;
    last += (t.shape[i] - 1) * t.stride[i];
  }
  return static_cast<std::size_t>(last + 1) * size_in_bytes(t.dtype);
}

std::size_t guard_behind() { return under_checker() ? 0 : kGuard; }

}  // namespace

bool under_checker() {
  static const bool on = std::getenv("MOBA_CUDA_CHECKER") != nullptr;
  return on;
}

DeviceMemory::DeviceMemory(std::size_t bytes) : size_(bytes) {
  MOBA_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<std::size_t>(bytes, 1)));
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

void DeviceMemory::poison(cudaStream_t stream) const { MOBA_CUDA(cudaMemsetAsync(data_, 0xff, size_, stream)); }

DeviceTensor::DeviceTensor(const ConstTensor& host)
    : front_(kGuard + reinterpret_cast<std::uintptr_t>(host.data) % 64),
      bytes_(extent(host)),
      memory_(front_ + bytes_ + guard_behind()) {
  view_.data = memory_.data() + front_;
  view_.dtype = host.dtype;
  view_.device = Device::cuda;
  MOBA_CUDA(cudaGetDevice(&view_.device_index));
  view_.rank = host.rank;
  view_.shape = host.shape;
  view_.stride = host.stride;
  MOBA_CUDA(cudaMemset(memory_.data(), 0xff, front_));
  MOBA_CUDA(cudaMemset(memory_.data() + front_ + bytes_, 0xff, guard_behind()));
  MOBA_CUDA(cudaStreamSynchronize(nullptr));
}

void DeviceTensor::upload(const void* host, cudaStream_t stream) const {
  MOBA_CUDA(cudaMemcpyAsync(view_.data, host, bytes_, cudaMemcpyHostToDevice, stream));
}

void DeviceTensor::download(void* host, cudaStream_t stream) const {
  MOBA_CUDA(cudaMemcpyAsync(host, view_.data, bytes_, cudaMemcpyDeviceToHost, stream));
}

bool DeviceTensor::equals(const void* host) const {
  std::vector<std::byte> bytes(bytes_);
  MOBA_CUDA(cudaMemcpy(bytes.data(), view_.data, bytes_, cudaMemcpyDeviceToHost));
  return bytes_ == 0 || std::memcmp(bytes.data(), host, bytes_) == 0;
}

bool DeviceTensor::guards_untouched() const {
  std::vector<std::byte> guards(front_ + guard_behind());
  MOBA_CUDA(cudaMemcpy(guards.data(), memory_.data(), front_, cudaMemcpyDeviceToHost));
  MOBA_CUDA(
      cudaMemcpy(guards.data() + front_, memory_.data() + front_ + bytes_, guard_behind(), cudaMemcpyDeviceToHost));
  return std::ranges::all_of(guards, [](std::byte b) { return b == kPattern; });
}

Tensor Mirror::add(const ConstTensor& host, const std::string& name, bool written) {
  if (!host.given()) return {};
  const DeviceTensor& device = arguments_.emplace_back(name, written, host).device;
  device.upload(host.data, stream_);
  return device.tensor();
}

ConstTensor Mirror::read(const ConstTensor& host, const std::string& name) { return add(host, name, false); }
Tensor Mirror::write(const Tensor& host, const std::string& name) { return add(host, name, true); }

Inputs Mirror::read(const Inputs& host) {
  return {read(host.q, "q"), read(host.k, "k"), read(host.v, "v"), read(host.cu_seqlens_q, "cu_seqlens_q"),
          read(host.cu_seqlens_k, "cu_seqlens_k")};
}

Outputs Mirror::write(const Outputs& host) { return {write(host.out, "out"), write(host.lse, "lse")}; }

ConstOutputs Mirror::read(const ConstOutputs& host) {
  return {read(host.out, "results.out"), read(host.lse, "results.lse")};
}

Gradients Mirror::write(const Gradients& host) {
  return {write(host.dq, "dq"), write(host.dk, "dk"), write(host.dv, "dv")};
}

Selection Mirror::read(const Selection& host) {
  return {add(host.ids, "ids", false), add(host.counts, "counts", false), add(host.offsets, "offsets", false),
          add(host.rows, "rows", false)};
}

Selection Mirror::write(const Selection& host) {
  return {write(host.ids, "ids"), write(host.counts, "counts"), write(host.offsets, "offsets"),
          write(host.rows, "rows")};
}

void Mirror::finish() {
  MOBA_CUDA(cudaStreamSynchronize(stream_));
  for (const Argument& argument : arguments_) {
    EXPECT_TRUE(argument.device.guards_untouched()) << "around " << argument.name;
    if (argument.written) {
      argument.device.download(argument.host, stream_);
    } else {
      EXPECT_TRUE(argument.device.equals(argument.host)) << argument.name << " is an input";
    }
  }
  MOBA_CUDA(cudaStreamSynchronize(stream_));
  arguments_.clear();
}

}  // namespace moba::test
