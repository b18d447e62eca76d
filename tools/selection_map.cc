#include "selection_map.h"

#include <algorithm>

namespace moba::cli {

SelectionMap make_selection_map(const Plan& plan, const ConstTensor& ids, std::int64_t q_begin, std::int64_t q_end,
                                std::int64_t k_len, std::int64_t most_cells) {
  const std::int64_t block = plan.problem().config.block_size, heads = plan.problem().q_heads, slots = plan.slots();
  SelectionMap map;
  map.query_tokens = q_end - q_begin;
  map.key_tokens = k_len;
  // Query token t sits at position t - q_begin + first_position; a negative position has no keys and is not drawn.
  const std::int64_t first_position = k_len - map.query_tokens, first_drawn = std::max<std::int64_t>(0, first_position);
  const std::int64_t blocks = map.blocks = k_len == 0 ? 0 : (k_len - 1) / block + 1;
  if (blocks == 0 || map.query_tokens == 0) return map;
  map.blocks_per_cell = (blocks - 1) / most_cells + 1;
  map.columns = (blocks - 1) / map.blocks_per_cell + 1;
  map.first_row = first_drawn / block / map.blocks_per_cell;
  map.rows = map.columns - map.first_row;
  map.shares.assign(static_cast<std::size_t>(heads),
                    std::vector<double>(static_cast<std::size_t>(map.rows * map.columns)));

  const auto cell_row = [&](std::int64_t position) { return position / block / map.blocks_per_cell - map.first_row; };
  std::vector<std::int64_t> queries(static_cast<std::size_t>(map.rows));  // tokens in each cell row
  for (std::int64_t position = first_drawn; position < k_len; ++position)
    ++queries[static_cast<std::size_t>(cell_row(position))];

  const auto* chosen = static_cast<const std::int32_t*>(ids.data);
  for (std::int64_t position = first_drawn; position < k_len; ++position) {
    const std::int64_t token = q_begin + position - first_position, row = cell_row(position);
    for (std::int64_t h = 0; h < heads; ++h) {
      double* cells = map.shares[static_cast<std::size_t>(h)].data() + row * map.columns;
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        const std::int32_t id = chosen[(token * heads + h) * slots + slot];
        if (id >= 0) cells[id / map.blocks_per_cell] += 1.0;
      }
    }
  }
  for (std::vector<double>& head : map.shares) {
    for (std::size_t cell = 0; cell < head.size(); ++cell) {
      const std::int64_t column = static_cast<std::int64_t>(cell) % map.columns;
      const std::int64_t width = std::min(map.blocks_per_cell, blocks - column * map.blocks_per_cell);
      head[cell] /= static_cast<double>(queries[cell / static_cast<std::size_t>(map.columns)] * width);
    }
  }
  return map;
}

}  // namespace moba::cli
