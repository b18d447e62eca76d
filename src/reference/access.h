// Strided tensors for plain loops: where an element is, and float64 copies.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"
#include "numeric.h"
#include "plan_impl.h"

namespace moba::reference {

// Offset of element (i, j, l).
inline std::int64_t at(const ConstTensor& x, std::int64_t i, std::int64_t j = 0, std::int64_t l = 0) {
  return i * x.stride[0] + j * x.stride[1] + l * x.stride[2];
}

inline float load(const ConstTensor& x, std::int64_t i, std::int64_t j, std::int64_t l) {
  return load_float(x.data, x.dtype, at(x, i, j, l));
}

inline void store(const Tensor& x, std::int64_t i, std::int64_t j, std::int64_t l, float value) {
  store_float(x.data, x.dtype, at(x, i, j, l), value);
}

// Rows [begin, begin + count) of one head of x [rows, heads, d], as float64 [count, d].
inline std::vector<double> widen(const ConstTensor& x, std::int64_t begin, std::int64_t count, std::int64_t head) {
  const std::int64_t d = x.shape[2];
  std::vector<double> wide(static_cast<std::size_t>(count * d));
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t c = 0; c < d; ++c) wide[i * d + c] = load(x, begin + i, head, c);
  }
  return wide;
}

// Sum of a[i] * b[i]; four partial sums, because one would wait for itself at every step.
inline double dot(const double* a, const double* b, std::int64_t n) {
  double sum[4] = {};
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (std::int64_t j = 0; j < 4; ++j) sum[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace moba::reference
