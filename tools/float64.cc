#include "float64.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "numeric.h"
#include "text.h"

namespace moba::cli {
namespace {

std::int64_t rows_in(const ConstTensor& tensor) { return tensor.shape[0] * tensor.shape[1]; }

double row_error(const ConstTensor& x, const float* reference, std::int64_t row, std::int64_t d, double least) {
  double difference = 0, size = 0;
  for (std::int64_t i = row * d; i < (row + 1) * d; ++i) {
    const double expected = static_cast<double>(reference[i]);
    const double gap = static_cast<double>(load_float(x.data, x.dtype, i)) - expected;
    difference += gap * gap;
    size += expected * expected;
  }
  if (difference == 0) return 0;
  return std::sqrt(difference) / std::max(std::sqrt(size), least);  // infinite where the reference is 0 and x is not
}

}  // namespace

Options reference_options() {
  Options options;
  options.backend = Backend::reference;
  return options;
}

Problem exact_problem(Problem problem) {
  problem.dtype = DType::f32;
  problem.rope.reset();
  return problem;
}

ConstTensor widen(const ConstTensor& tensor, Buffer& memory) {
  const std::int64_t count = tensor.shape[0] * tensor.shape[1] * tensor.shape[2];
  memory = Buffer(static_cast<std::size_t>(count) * sizeof(float));
  for (std::int64_t i = 0; i < count; ++i) memory.as<float>()[i] = load_float(tensor.data, tensor.dtype, i);
  return {memory.data(), DType::f32, {tensor.shape[0], tensor.shape[1], tensor.shape[2]}};
}

RowErrors row_errors(const ConstTensor& x, const ConstTensor& reference, double least) {
  const std::int64_t rows = rows_in(x), d = x.shape[2];
  RowErrors result;
  std::vector<double> errors;
  for (std::int64_t row = 0; row < rows; ++row) {
    const double error = row_error(x, static_cast<const float*>(reference.data), row, d, least);
    if (std::isnan(error)) {
      ++result.not_finite;
    } else {
      errors.push_back(error);
    }
  }
  if (errors.empty()) return result;
  const auto middle = errors.begin() + static_cast<std::ptrdiff_t>(errors.size() / 2);
  std::nth_element(errors.begin(), middle, errors.end());
  result.median = *middle;
  result.max = *std::max_element(errors.begin(), errors.end());
  return result;
}

std::string columns(const RowErrors& errors) {
  std::string text = format("%12.2e %12.2e", errors.max, errors.median);
  if (std::isinf(errors.max)) text += "   rounding where float64 has 0";
  if (errors.not_finite > 0) text += "   and " + std::to_string(errors.not_finite) + " rows not finite";
  return text;
}

double norm(const ConstTensor& tensor) {
  double sum = 0;
  for (std::int64_t row = 0; row < rows_in(tensor); ++row) sum += std::pow(row_norm(tensor, row), 2);
  return std::sqrt(sum);
}

double row_norm(const ConstTensor& tensor, std::int64_t row) {
  const std::int64_t d = tensor.shape[2];
  double sum = 0;
  for (std::int64_t i = row * d; i < (row + 1) * d; ++i) {
    sum += std::pow(static_cast<double>(load_float(tensor.data, tensor.dtype, i)), 2);
  }
  return std::sqrt(sum);
}

double average_row(const ConstTensor& tensor) {
  double sum = 0;
  std::int64_t finite = 0;
  for (std::int64_t row = 0; row < rows_in(tensor); ++row) {
    const double size = row_norm(tensor, row);
    if (!std::isfinite(size)) continue;
    sum += size * size;
    ++finite;
  }
  return finite > 0 ? std::sqrt(sum / static_cast<double>(finite)) : 0.0;
}

double longest_row(const ConstTensor& tensor) {
  double longest = 0;
  for (std::int64_t row = 0; row < rows_in(tensor); ++row) {
    const double size = row_norm(tensor, row);
    if (std::isfinite(size)) longest = std::max(longest, size);
  }
  return longest;
}

}  // namespace moba::cli
