// A selection as a grid: query blocks against key blocks, per head.
#pragma once

#include <cstdint>
#include <vector>

#include "moba/attention.h"
#include "moba/plan.h"

namespace moba::cli {

// One sequence. A cell covers `blocks_per_cell` query blocks (rows) by as many key blocks (columns), aligned to
// multiples of that; its share is that of the (query, key block) pairs within it that the selection holds, so that with
// one block per cell it is the share of the queries of the block that chose the key block.
struct SelectionMap {
  std::int64_t rows = 0, columns = 0;
  std::int64_t first_row = 0;  // the cell row, counted from position 0, where rows begins
  std::int64_t blocks_per_cell = 1;
  std::int64_t blocks = 0;  // of the sequence
  std::int64_t query_tokens = 0, key_tokens = 0;
  std::vector<std::vector<double>> shares;  // per head: [rows][columns]

  double share(std::size_t head, std::int64_t row, std::int64_t column) const {
    return shares[head][static_cast<std::size_t>(row * columns + column)];
  }
};

// `ids` are those of a selection per query head, on the host, contiguous. The sequence whose queries are tokens
// [q_begin, q_end) and which has k_len keys. No grid has more than `most_cells` cells along a side.
SelectionMap make_selection_map(const Plan& plan, const ConstTensor& ids, std::int64_t q_begin, std::int64_t q_end,
                                std::int64_t k_len, std::int64_t most_cells);

}  // namespace moba::cli
