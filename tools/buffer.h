// Memory for tensors: 64-byte aligned, not initialised, freed with its owner.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <span>

#include "moba/tensor.h"

namespace moba::cli {

// Bytes of the elements of a tensor: of its memory, if it is contiguous.
inline std::size_t bytes_of(const ConstTensor& tensor) {
  std::size_t bytes = size_in_bytes(tensor.dtype);
  for (int i = 0; i < tensor.rank; ++i) bytes *= static_cast<std::size_t>(tensor.shape[static_cast<std::size_t>(i)]);
  return bytes;
}

class Buffer {
 public:
  Buffer() = default;
  // Never null, not even for 0 bytes: a tensor without elements still has an address.
  explicit Buffer(std::size_t bytes)
      : memory_(static_cast<std::byte*>(::operator new(bytes == 0 ? 1 : bytes, kAlignment))), size_(bytes) {}

  std::byte* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }
  std::span<std::byte> span() const { return {memory_.get(), size_}; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };

  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace moba::cli
