// Which keys each row attends to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "call.h"
#include "plan_impl.h"

namespace moba::reference {

// Keys [begin, end) of a sequence.
struct Span {
  std::int64_t begin, end;
};

class KeySets {
 public:
  // Every key that a row may see.
  explicit KeySets(const Call& call) : call_(call) {}

  // Those of its blocks. Fast backends walk the lists of rows block by block; here they are turned back into blocks per
  // row.
  KeySets(const Call& call, const Selection& selection) : call_(call), selected_(true) {
    const std::int64_t heads = call.q.shape[1], group = call.plan.group;
    const auto* offsets = static_cast<const std::int64_t*>(selection.offsets.data);
    const auto* rows = static_cast<const std::int32_t*>(selection.rows.data);
    blocks_of_.resize(static_cast<std::size_t>(call.q.shape[0] * heads));
    for (std::int64_t key_head = 0; key_head < heads / group; ++key_head) {
      for (const Sequence& s : call.sequences) {
        for (std::int64_t b = 0; b < s.blocks; ++b) {
          const std::int64_t list = key_head * call.plan.max_blocks + s.block_begin + b;
          for (std::int64_t r = offsets[list]; r < offsets[list + 1]; ++r) {
            blocks_of_[rows[r] / group * heads + key_head * group + rows[r] % group].push_back(b);
          }
        }
      }
    }
  }

  // Of query `token` (of the packed batch), which is in `s`, and query head `head`; ascending.
  std::vector<Span> of(const Sequence& s, std::int64_t token, std::int64_t head) const {
    const Config& config = call_.plan.problem.config;
    const std::int64_t position = s.first_position() + token - s.q_begin;
    if (!selected_) return {{0, visible_keys(position, 0, s.k_len, config.causal)}};
    std::vector<Span> spans;
    for (const std::int64_t b : blocks_of_[token * call_.q.shape[1] + head]) {
      const std::int64_t start = b * config.block_size, length = std::min(config.block_size, s.k_len - start);
      spans.push_back({start, start + visible_keys(position, start, length, config.causal)});
    }
    return spans;
  }

 private:
  const Call& call_;
  bool selected_ = false;
  std::vector<std::vector<std::int64_t>> blocks_of_;  // [Tq, Hq]
};

}  // namespace moba::reference
