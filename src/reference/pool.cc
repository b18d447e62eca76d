// Step 2, pool: the centroid of a block is the mean of its keys.
#include <algorithm>

#include "reference/access.h"

namespace moba::reference {
namespace {

// float32, and in this order in every backend, so that all of them choose the same blocks: groups of 64 keys, each
// added up on its own, then the groups.
float sum_of_keys(const ConstTensor& k, std::int64_t begin, std::int64_t end, std::int64_t head, std::int64_t c) {
  constexpr std::int64_t kGroup = 64;
  float total = 0.0f;
  for (std::int64_t group = begin; group < end; group += kGroup) {
    float sum = load(k, group, head, c);
    for (std::int64_t j = group + 1; j < std::min(group + kGroup, end); ++j) sum += load(k, j, head, c);
    total = group == begin ? sum : total + sum;
  }
  return total;
}

}  // namespace

void pool(const Call& call, const Tensor& centroids) {
  const std::int64_t block_size = call.plan.problem.config.block_size;
  for (const Sequence& s : call.sequences) {
    for (std::int64_t b = 0; b < s.blocks; ++b) {
      const std::int64_t start = b * block_size, length = std::min(block_size, s.k_len - start);  // the last is short
      const std::int64_t begin = s.k_begin + start, end = begin + length;
      for (std::int64_t head = 0; head < call.k.shape[1]; ++head) {
        for (std::int64_t c = 0; c < call.k.shape[2]; ++c) {
          const float mean = sum_of_keys(call.k, begin, end, head, c) / static_cast<float>(length);
          store(centroids, s.block_begin + b, head, c, mean);
        }
      }
    }
  }
}

}  // namespace moba::reference
