// Results held against the reference backend, which computes in float64.
#pragma once

#include <cstdint>

#include "attention_file.h"
#include "float64.h"
#include "moba/attention.h"
#include "moba/plan.h"
#include "progress.h"

namespace moba::cli {

struct Accuracy {
  std::int64_t tokens = 0;          // query tokens held against the reference
  std::int64_t rows = 0;            // rows of these: tokens x heads
  std::int64_t same_selection = 0;  // rows for which the reference chose the same blocks
  RowErrors moba, dense;
};

// Rows, of the last of three dimensions, in which both hold the same ids. Contiguous.
std::int64_t equal_rows(const ConstTensor& ids, const ConstTensor& others);

// Bytes that check_accuracy takes beside what it is given.
double accuracy_bytes(const Plan& plan, std::int64_t tokens);

// Holds the last `tokens` query tokens (fewer where there are fewer) of what `plan` computed from `file` against
// float64: the chosen blocks `ids` against the reference's own, `moba_out` against float64 attention over these
// blocks, `dense_out` against float64 attention over everything. All three on the host, contiguous.
Accuracy check_accuracy(const Plan& plan, const AttentionFile& file, const ConstTensor& ids,
                        const ConstTensor& moba_out, const ConstTensor& dense_out, std::int64_t tokens,
                        Progress& progress);

}  // namespace moba::cli
