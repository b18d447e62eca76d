#include "gpu.h"

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>

#include "moba/error.h"

namespace moba::cli::gpu {
namespace {

// The default stream: the library puts its work there when it is given none.
constexpr cudaStream_t kStream = nullptr;

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  throw Error(std::string("CUDA: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + "), while " + doing);
}

void use(int device) { check(cudaSetDevice(device), "choosing the device"); }

}  // namespace

std::byte* allocate(int device, std::size_t bytes) {
  use(device);
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // so that no later call reports it again
    return nullptr;
  }
  check(error, "allocating memory");
  return static_cast<std::byte*>(memory);
}

void release(int device, std::byte* memory) noexcept {
  if (memory != nullptr && cudaSetDevice(device) == cudaSuccess) cudaFree(memory);
}

MemoryState memory_state(int device) {
  use(device);
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  return {static_cast<double>(free), static_cast<double>(total)};
}

void copy_to_device(int device, void* to, const void* from, std::size_t bytes) {
  use(device);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, kStream), "copying to the device");
  check(cudaStreamSynchronize(kStream), "copying to the device");
}

void copy_to_host(int device, void* to, const void* from, std::size_t bytes) {
  use(device);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, kStream), "copying from the device");
  check(cudaStreamSynchronize(kStream), "copying from the device");
}

// Keeps the stream waiting. Not for long: were the queue to fill up, the host would wait for the stream in its turn.
class Marks::Hold {
 public:
  void release() {
    {
      const std::lock_guard lock(mutex_);
      released_ = true;
    }
    wake_.notify_all();
  }
  static void wait(void* hold) { static_cast<Hold*>(hold)->wait_here(); }

 private:
  void wait_here() {
    std::unique_lock lock(mutex_);
    wake_.wait_for(lock, std::chrono::milliseconds(2), [this] { return released_; });
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  bool released_ = false;
};

Marks::Marks(int device) : device_(device), hold_(std::make_unique<Hold>()) {
  use(device_);
  check(cudaLaunchHostFunc(kStream, Hold::wait, hold_.get()), "preparing to measure");
}

Marks::~Marks() {
  hold_->release();
  if (cudaSetDevice(device_) != cudaSuccess) return;
  cudaStreamSynchronize(kStream);  // the stream reads hold_
  for (void* event : events_) cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

void Marks::set() {
  use(device_);
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "measuring");
  events_.push_back(event);
  check(cudaEventRecord(event, kStream), "measuring");
}

std::vector<double> Marks::seconds() {
  hold_->release();
  use(device_);
  check(cudaStreamSynchronize(kStream), "waiting for the kernels");
  std::vector<double> seconds;
  for (std::size_t i = 1; i < events_.size(); ++i) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(events_[i - 1]),
                               static_cast<cudaEvent_t>(events_[i])),
          "measuring");
    seconds.push_back(static_cast<double>(milliseconds) * 1e-3);
  }
  return seconds;
}

}  // namespace moba::cli::gpu
