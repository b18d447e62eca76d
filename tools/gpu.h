// The few CUDA calls of the program: memory, copies, times. gpu_absent.cc stands in for gpu.cc in a build without CUDA,
// where no plan of the cuda backend can be made and so none of these is ever called.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace moba::cli::gpu {

// Null where there is not enough memory; other faults are a moba::Error.
std::byte* allocate(int device, std::size_t bytes);
void release(int device, std::byte* memory) noexcept;

struct Release {
  int device = 0;
  void operator()(std::byte* memory) const { release(device, memory); }
};

struct MemoryState {
  double free = 0, total = 0;
};
MemoryState memory_state(int device);

// Both wait until the copy is done, and for what was queued before it.
void copy_to_device(int device, void* to, const void* from, std::size_t bytes);
void copy_to_host(int device, void* to, const void* from, std::size_t bytes);

// Moments in the default stream of a device. What is queued after the constructor starts only when the last mark has
// been set, or two milliseconds later: by then the host is ahead, and what lies between two marks is the work of the
// device, not the time that the host takes to ask for it.
class Marks {
 public:
  explicit Marks(int device);
  ~Marks();
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  void set();
  // Seconds from each mark to the next. Waits until the last one is reached; faults of the work come out here.
  std::vector<double> seconds();

 private:
  struct State;

  std::unique_ptr<State> state_;
};

}  // namespace moba::cli::gpu
