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

struct Marks::State {
  explicit State(int index) : device(index) {}

  // Keeps the stream waiting. Not for long: were the queue to fill up, the host would wait for the stream in its turn.
  static void hold(void* state) {
    auto& self = *static_cast<State*>(state);
    std::unique_lock lock(self.mutex);
    self.wake.wait_for(lock, std::chrono::milliseconds(2), [&self] { return self.released; });
  }
  void release() {
    {
      const std::lock_guard lock(mutex);
      released = true;
    }
    wake.notify_all();
  }

  const int device;
  std::vector<cudaEvent_t> events;
  std::mutex mutex;
  std::condition_variable wake;
  bool released = false;
};

Marks::Marks(int device) : state_(std::make_unique<State>(device)) {
  use(device);
  check(cudaLaunchHostFunc(kStream, State::hold, state_.get()), "preparing to measure");
}

Marks::~Marks() {
  state_->release();
  if (cudaSetDevice(state_->device) != cudaSuccess) return;
  cudaStreamSynchronize(kStream);  // the stream reads the state
  for (cudaEvent_t event : state_->events) cudaEventDestroy(event);
}

void Marks::set() {
  use(state_->device);
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "measuring");
  state_->events.push_back(event);
  check(cudaEventRecord(event, kStream), "measuring");
}

std::vector<double> Marks::seconds() {
  state_->release();
  use(state_->device);
  check(cudaStreamSynchronize(kStream), "waiting for the kernels");
  const std::vector<cudaEvent_t>& events = state_->events;
  std::vector<double> seconds;
  for (std::size_t i = 1; i < events.size(); ++i) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, events[i - 1], events[i]), "measuring");
    seconds.push_back(static_cast<double>(milliseconds) * 1e-3);
  }
  return seconds;
}

}  // namespace moba::cli::gpu
