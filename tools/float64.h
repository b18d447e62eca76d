// What results are held against the reference backend with, which computes in float64.
#pragma once

#include <cstdint>
#include <string>

#include "buffer.h"
#include "moba/plan.h"

namespace moba::cli {

Options reference_options();

// The problem in float32 with q and k as they are: of inputs that are widened, and rotated already.
Problem exact_problem(Problem problem);

// A copy in float32 of a contiguous tensor of rank 3. float32 holds every value of the narrower types: the reference
// then reads the very same numbers and does not round its result to 16 bits.
ConstTensor widen(const ConstTensor& tensor, Buffer& memory);

// |x - reference| / |reference| (Euclidean) of every row.
struct RowErrors {
  double max = 0, median = 0;
  std::int64_t not_finite = 0;  // rows where one of the two is NaN or infinite; not in max and median
};

// Rows are those of the last of three dimensions. `reference` is float32; rows of it that are shorter than `least`
// count as that long.
RowErrors row_errors(const ConstTensor& x, const ConstTensor& reference, double least = 0);

// The columns "max median", with what is not finite behind them.
std::string columns(const RowErrors& errors);

// The Euclidean norms of all elements of a tensor of rank 3; of one row; of an average row (the root of the mean of the
// squares) and of the longest one, rows that are not finite left out.
double norm(const ConstTensor& tensor);
double row_norm(const ConstTensor& tensor, std::int64_t row);
double average_row(const ConstTensor& tensor);
double longest_row(const ConstTensor& tensor);

}  // namespace moba::cli
