// How a backend divides its scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "call.h"

namespace moba {

// Hands out pieces of a scratch area, each at a multiple of kAlignment bytes.
class Carver {
 public:
  explicit Carver(std::byte* memory = nullptr) : memory_(memory) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += aligned(static_cast<std::size_t>(count) * sizeof(T));
    return piece;
  }
  // Bytes handed out so far; with no memory behind it a Carver measures.
  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

}  // namespace moba
