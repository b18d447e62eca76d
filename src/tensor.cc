#include "moba/tensor.h"

#include <algorithm>

#include "moba/error.h"

namespace moba {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
  }
  return "unknown";
}

const char* name(Device device) {
  switch (device) {
    case Device::cpu:
      return "cpu";
    case Device::cuda:
      return "cuda";
  }
  return "unknown";
}

std::size_t size_in_bytes(DType dtype) {
  switch (dtype) {
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::i64:
      return 8;
  }
  throw Error("dtype: " + std::to_string(static_cast<int>(dtype)) + " is none of moba::DType");
}

template <class Void>
BasicTensor<Void>::BasicTensor(Void* pointer, DType type, std::initializer_list<std::int64_t> dims, Device where,
                               int index_of_device)
    : data(pointer), dtype(type), device(where), device_index(index_of_device), rank(static_cast<int>(dims.size())) {
  if (dims.size() > kMaxRank) {
    throw Error("tensor: rank is " + std::to_string(dims.size()) + "; at most " + std::to_string(kMaxRank) +
                " is allowed");
  }
  int i = 0;
  for (const std::int64_t dim : dims) shape[i++] = dim;
  std::int64_t step = 1;
  for (i = rank - 1; i >= 0; --i) {
    stride[i] = step;
    if (shape[i] > 0 && __builtin_mul_overflow(step, shape[i], &step)) {
      throw Error("tensor: the shape of " + describe(*this) + " has more than 2^63 elements");
    }
  }
}

template <class Void>
BasicTensor<Void>::BasicTensor(Void* pointer, DType type, std::initializer_list<std::int64_t> dims,
                               std::initializer_list<std::int64_t> strides, Device where, int index_of_device)
    : BasicTensor(pointer, type, dims, where, index_of_device) {
  if (strides.size() != dims.size()) {
    throw Error("tensor: " + std::to_string(strides.size()) + " strides for " + describe(*this) +
                "; as many as dimensions "
                "are allowed");
  }
  std::ranges::copy(strides, stride.begin());
}

template struct BasicTensor<void>;
template struct BasicTensor<const void>;

std::string describe(const ConstTensor& tensor) {
  std::string text = std::string(name(tensor.dtype)) + " [";
  for (int i = 0; i < tensor.rank && i < kMaxRank; ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

}  // namespace moba
