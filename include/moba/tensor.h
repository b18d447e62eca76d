// Non-owning views of tensors: pointer, dtype, device, shape, strides.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "moba/export.h"

namespace moba {

// f16 is IEEE binary16, bf16 the upper half of a float32; both are passed as raw 16-bit words.
enum class DType : std::uint8_t { f32, f16, bf16, i32, i64 };

// Where data lives. A plan of the cuda backend takes cuda tensors of its device, every other plan cpu tensors.
enum class Device : std::uint8_t { cpu, cuda };

MOBA_EXPORT const char* name(DType dtype);
MOBA_EXPORT const char* name(Device device);
MOBA_EXPORT std::size_t size_in_bytes(DType dtype);

inline constexpr int kMaxRank = 4;

// A view of `rank` dimensions. Strides count elements, not bytes; the last one must be 1 wherever a function does not
// say otherwise. A view of rank 0 with a null pointer stands for "not given".
template <class Void>
struct BasicTensor {
  Void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int device_index = 0;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};

  BasicTensor() = default;
  // A contiguous (row-major) tensor. At most kMaxRank dimensions, or moba::Error.
  BasicTensor(Void* pointer, DType type, std::initializer_list<std::int64_t> dims, Device where = Device::cpu,
              int index_of_device = 0);
  // One with strides of its own, as many as dimensions.
  BasicTensor(Void* pointer, DType type, std::initializer_list<std::int64_t> dims,
              std::initializer_list<std::int64_t> strides, Device where = Device::cpu, int index_of_device = 0);
  // A mutable view passes wherever a read-only one is asked for.
  template <class Other>
  requires(std::is_const_v<Void>&& std::is_same_v<Other, std::remove_const_t<Void>>)
      BasicTensor(const BasicTensor<Other>& other)
      : data(other.data),
        dtype(other.dtype),
        device(other.device),
        device_index(other.device_index),
        rank(other.rank),
        shape(other.shape),
        stride(other.stride) {}

  bool given() const { return rank != 0; }
};

using Tensor = BasicTensor<void>;
using ConstTensor = BasicTensor<const void>;
extern template struct MOBA_EXPORT BasicTensor<void>;
extern template struct MOBA_EXPORT BasicTensor<const void>;

// "f32 [4096, 9, 64]", for messages and logs.
MOBA_EXPORT std::string describe(const ConstTensor& tensor);

}  // namespace moba
