// The swizzle of operands in shared memory: 16-byte chunk c of row r stands at place c ^ (r % 8) of its row, so that
// the eight rows that a matrix load reads lie in different banks. With rows of 128 bytes it is that of wgmma and of the
// tensor copy.
#pragma once

namespace moba::cuda {

// Where chunk `chunk` of row `row` stands, rows of `row_bytes`.
__device__ __forceinline__ int swizzled(int row_bytes, int row, int chunk) {
  return row * row_bytes + ((chunk ^ (row & 7)) << 4);
}

// Operands of wgmma consist of bands of 64 columns, each [rows, 128 bytes].
inline constexpr int kBandBytes = 128, kBandColumns = 64;

__device__ __forceinline__ int swizzled_band(int rows, int row, int chunk) {
  return chunk / 8 * rows * kBandBytes + swizzled(kBandBytes, row, chunk % 8);
}

}  // namespace moba::cuda
