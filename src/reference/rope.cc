// Step 1, rope: turn each pair of dimensions of q and k by position * frequency.
#include <array>

#include "reference/access.h"
#include "rope_table.h"

namespace moba::reference {
namespace {

// All heads of one token. The products of two float32 are exact in float64, so each result is rounded the same way
// whether or not a machine fuses the multiply and the add.
void rotate(const Rope& rope, const RopeTable& table, std::int64_t position, std::int64_t token, const ConstTensor& x,
            const Tensor& y) {
  std::array<float, RopeTable::kMaxPairs> cos, sin;
  table.rows(position, 1, cos.data(), sin.data());
  const std::int64_t pairs = table.pairs();
  for (std::int64_t head = 0; head < x.shape[1]; ++head) {
    for (std::int64_t i = 0; i < pairs; ++i) {
      const bool half_split = rope.style == RopeStyle::half_split;
      const std::int64_t first = half_split ? i : 2 * i, second = half_split ? i + pairs : 2 * i + 1;
      const double x0 = load(x, token, head, first), x1 = load(x, token, head, second);
      store(y, token, head, first, static_cast<float>(x0 * cos[i] - x1 * sin[i]));
      store(y, token, head, second, static_cast<float>(x1 * cos[i] + x0 * sin[i]));
    }
    for (std::int64_t c = 2 * pairs; c < x.shape[2]; ++c) store(y, token, head, c, load(x, token, head, c));
  }
}

}  // namespace

void rope(const Call& call, const Tensor& q_rotated, const Tensor& k_rotated) {
  const Rope& rope = *call.plan.problem.rope;
  const RopeTable& table = *call.plan.rope;
  for (const Sequence& s : call.sequences) {
    for (std::int64_t i = 0; i < s.q_len; ++i) {
      rotate(rope, table, s.first_position() + i, s.q_begin + i, call.q, q_rotated);
    }
    for (std::int64_t j = 0; k_rotated.given() && j < s.k_len; ++j)
      rotate(rope, table, j, s.k_begin + j, call.k, k_rotated);
  }
}

}  // namespace moba::reference
