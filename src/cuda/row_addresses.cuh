// Where the rows of a [tokens, heads, d] tensor lie, by row id. They are addressed in 32 bits of the greatest unit that
// divides their strides: 256 bytes for contiguous [Tq, Hq, 128], never below 16, and tensors span up to 64 GiB
// (checks.cc).
#pragma once

#include <cstdint>
#include <numeric>

#include "cuda/contract.h"

namespace moba::cuda {

struct RowAddresses {
  const char* data;
  std::int64_t key_head_bytes;           // from the query heads of a key head to those of the next
  std::uint32_t unit;                    // bytes; row id i of a key head lies
  std::uint32_t row_units, token_units;  // row_units * i + token_units * token of them behind its first, mod 2^32

  RowAddresses(const View<const void>& view, int group) {
    constexpr int kElementBytes = 2;
    constexpr std::int64_t kLargestUnit = 1 << 16;
    // With one query head to a key head the distance between heads does not count.
    const std::int64_t token_bytes = view.token_stride * kElementBytes;
    const std::int64_t head_bytes = group == 1 ? 0 : view.head_stride * kElementBytes;
    const std::int64_t divisor = std::gcd(std::gcd(token_bytes, head_bytes), kLargestUnit);
    data = static_cast<const char*>(view.data);
    key_head_bytes = group * view.head_stride * kElementBytes;
    unit = static_cast<std::uint32_t>(divisor);
    row_units = static_cast<std::uint32_t>(head_bytes / divisor);
    token_units = static_cast<std::uint32_t>((token_bytes - group * head_bytes) / divisor);
  }
  __device__ __forceinline__ std::uint32_t units_of(int row, int token) const {
    return row_units * row + token_units * token;
  }
};

}  // namespace moba::cuda
