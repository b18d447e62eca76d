// Step 5, index: turn "which blocks does a row want" into "which rows want a block".
#include <algorithm>
#include <numeric>

#include "reference/access.h"

namespace moba::reference {
namespace {

// Calls visit(key head, block of the batch, row) for every choice, rows ascending.
template <class Visit>
void for_each_choice(const Call& call, const Selection& selection, Visit visit) {
  const auto* ids = static_cast<const std::int32_t*>(selection.ids.data);
  const std::int64_t group = call.plan.group;
  const bool shared = selection.ids.shape[1] != call.plan.problem.q_heads;  // one list for the heads of a key head
  for (std::int64_t key_head = 0; key_head < call.plan.problem.kv_heads; ++key_head) {
    for (const Sequence& s : call.sequences) {
      for (std::int64_t row = s.q_begin * group; row < (s.q_begin + s.q_len) * group; ++row) {
        const std::int64_t token = row / group, head = shared ? key_head : key_head * group + row % group;
        for (std::int64_t slot = 0; slot < call.plan.slots; ++slot) {
          const std::int32_t id = ids[at(selection.ids, token, head, slot)];
          if (id < 0) break;
          visit(key_head, s.block_begin + id, row);
        }
      }
    }
  }
}

}  // namespace

void index(const Call& call, const Selection& selection) {
  auto* offsets = static_cast<std::int64_t*>(selection.offsets.data);
  auto* rows = static_cast<std::int32_t*>(selection.rows.data);
  const std::int64_t max_blocks = call.plan.max_blocks, lists = call.plan.problem.kv_heads * max_blocks;

  // A counting sort: how long each list is, where it starts, then its rows.
  std::fill_n(offsets, lists + 1, 0);
  for_each_choice(call, selection, [&](std::int64_t key_head, std::int64_t block, std::int64_t) {
    ++offsets[key_head * max_blocks + block + 1];
  });
  std::partial_sum(offsets, offsets + lists + 1, offsets);
  std::vector<std::int64_t> next(offsets, offsets + lists);
  for_each_choice(call, selection, [&](std::int64_t key_head, std::int64_t block, std::int64_t row) {
    rows[next[key_head * max_blocks + block]++] = static_cast<std::int32_t>(row);
  });

  const auto* ids = static_cast<const std::int32_t*>(selection.ids.data);
  auto* counts = static_cast<std::int32_t*>(selection.counts.data);
  for (std::int64_t token = 0; token < selection.ids.shape[0]; ++token) {
    for (std::int64_t head = 0; head < selection.ids.shape[1]; ++head) {
      std::int32_t count = 0;
      while (count < call.plan.slots && ids[at(selection.ids, token, head, count)] >= 0) ++count;
      counts[at(selection.counts, token, head)] = count;
    }
  }
}

}  // namespace moba::reference
