// Parts of tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "moba/tensor.h"

namespace moba::cli {

// Rows first ... first + count - 1 of the first dimension.
template <class Void>
BasicTensor<Void> rows_of(BasicTensor<Void> tensor, std::int64_t first, std::int64_t count) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  tensor.data = static_cast<Byte*>(tensor.data) +
                first * tensor.stride[0] * static_cast<std::int64_t>(size_in_bytes(tensor.dtype));
  tensor.shape[0] = count;
  return tensor;
}

}  // namespace moba::cli
