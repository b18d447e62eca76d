// The place where a plan computes, host or GPU, so that commands need not know which: memory there, tensors brought
// there and back, times.
#pragma once

#include <chrono>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "buffer.h"
#include "gpu.h"
#include "moba/attention.h"
#include "moba/plan.h"

namespace moba::cli {

struct Place {
  Place() = default;
  explicit Place(const Plan& plan);

  Device device = Device::cpu;
  int index = 0;
};

// Memory at a place: aligned to 64 bytes or more, not initialised, freed with its owner.
class PlacedMemory {
 public:
  PlacedMemory() = default;
  // `what` it is for: where a GPU has too little, the moba::Error says so.
  PlacedMemory(Place place, std::size_t bytes, const char* what);

  std::span<std::byte> span() const {
    return place_.device == Device::cpu ? host_.span() : std::span(gpu_.get(), size_);
  }

 private:
  Place place_;
  std::size_t size_ = 0;
  Buffer host_;
  std::unique_ptr<std::byte, gpu::Release> gpu_;
};

// A contiguous tensor in memory of its own.
Tensor allocate(PlacedMemory& memory, Place place, DType dtype, std::initializer_list<std::int64_t> shape,
                const char* what);

// A contiguous tensor from the host's memory, where a plan can read it: a copy, if that is elsewhere.
class PlacedTensor {
 public:
  PlacedTensor(Place place, const ConstTensor& host, const char* what);

  const ConstTensor& tensor() const { return tensor_; }

 private:
  PlacedMemory memory_;
  ConstTensor tensor_;
};

// The same of inputs.
class PlacedInputs {
 public:
  PlacedInputs(const Plan& plan, const Inputs& host);

  const Inputs& inputs() const { return inputs_; }

 private:
  PlacedTensor q_, k_, v_, cu_seqlens_q_, cu_seqlens_k_;
  Inputs inputs_;
};

// A contiguous tensor where the host can read it: a copy, if it lies elsewhere.
class OnHost {
 public:
  explicit OnHost(const Tensor& tensor);

  const Tensor& tensor() const { return tensor_; }

 private:
  Buffer memory_;
  Tensor tensor_;
};

// The time of calls of a plan, one after another: on a GPU that of its work alone.
class Stopwatch {
 public:
  Stopwatch() = default;  // of the host
  explicit Stopwatch(const Plan& plan);

  void lap();
  // Seconds from each lap() to the next, once the work of all is done.
  std::vector<double> seconds();

 private:
  std::vector<std::chrono::steady_clock::time_point> host_;
  std::unique_ptr<gpu::Marks> gpu_;  // null: the host's clock it is
};

// Refuses (moba::Error) to compute on a GPU what only the host can; `reason` is why.
void require_host(const Options& options, const char* reason);

// Refuses (moba::Error) to take more of the memory of a plan's GPU than is free.
void require_gpu_memory(const Plan& plan, double bytes);

}  // namespace moba::cli
