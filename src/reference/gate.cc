// Steps 3 and 4, gate: each query head of each token scores the blocks by q . centroid and picks the best.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "reference/access.h"
#include "reference/reference.h"

namespace moba::reference {

std::vector<double> scores(const Call& call, const ConstTensor& centroids, const Sequence& sequence, std::int64_t token,
                           std::int64_t head, std::int64_t blocks) {
  const std::int64_t d = call.q.shape[2];
  const std::vector<double> q = widen(call.q, token, 1, head);
  const std::vector<double> c = widen(centroids, sequence.block_begin, blocks, head / call.plan.group);
  std::vector<double> s(static_cast<std::size_t>(blocks));
  for (std::int64_t b = 0; b < blocks; ++b) s[b] = dot(q.data(), &c[b * d], d);
  return s;
}

namespace {

// The `count` best blocks: the higher score, then the more recent block; NaN behind every number.
std::vector<std::int32_t> best(const std::vector<double>& score, std::int64_t count) {
  std::vector<std::int32_t> ids(score.size());
  std::iota(ids.begin(), ids.end(), 0);
  count = std::min(count, static_cast<std::int64_t>(ids.size()));
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), [&](std::int32_t a, std::int32_t b) {
    if (std::isnan(score[a]) != std::isnan(score[b])) return std::isnan(score[b]);
    if (score[a] < score[b] || score[b] < score[a]) return score[a] > score[b];
    return a > b;
  });
  ids.resize(static_cast<std::size_t>(count));
  return ids;
}

}  // namespace

void gate(const Call& call, const ConstTensor& centroids, const Selection& selection) {
  const Config& config = call.plan.problem.config;
  auto* ids = static_cast<std::int32_t*>(selection.ids.data);
  auto* counts = static_cast<std::int32_t*>(selection.counts.data);
  for (const Sequence& s : call.sequences) {
    for (std::int64_t i = 0; i < s.q_len; ++i) {
      const std::int64_t token = s.q_begin + i, position = s.first_position() + i;
      for (std::int64_t head = 0; head < call.q.shape[1]; ++head) {
        std::vector<std::int32_t> chosen;
        if (!config.causal) {
          chosen = best(scores(call, centroids, s, token, head, s.blocks), config.top_k);
        } else if (position >= 0) {  // else before the first key: nothing to see
          // The own block is always in; all before it are past, so candidates.
          const std::int64_t own = position / config.block_size;
          chosen = best(scores(call, centroids, s, token, head, own), config.top_k - 1);
          chosen.push_back(static_cast<std::int32_t>(own));
        }
        std::sort(chosen.begin(), chosen.end());
        counts[at(selection.counts, token, head)] = static_cast<std::int32_t>(chosen.size());
        chosen.resize(static_cast<std::size_t>(call.plan.slots), -1);
        for (std::int64_t slot = 0; slot < call.plan.slots; ++slot) {
          ids[at(selection.ids, token, head, slot)] = chosen[slot];
        }
      }
    }
  }
}

}  // namespace moba::reference
