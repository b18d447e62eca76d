#include "kept_mass.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "text.h"

namespace moba::cli {
namespace {

// Blocks that the row at `position` of a sequence of `k_len` keys may choose from, its own among them.
std::int64_t blocks_in_reach(const Config& config, std::int64_t position, std::int64_t k_len) {
  const std::int64_t last_key = config.causal ? position : k_len - 1;
  return last_key / config.block_size + 1;
}

}  // namespace

std::vector<KeptMass> kept_mass(const Problem& problem, const std::vector<std::int64_t>& starts_q,
                                const std::vector<std::int64_t>& starts_k, const ConstTensor& moba,
                                const ConstTensor& dense, std::int64_t first_sequence, std::int64_t last_sequence) {
  std::vector<KeptMass> heads(static_cast<std::size_t>(problem.q_heads));
  for (std::int64_t h = 0; h < problem.q_heads; ++h) {
    KeptMass& head = heads[static_cast<std::size_t>(h)];
    double sum = 0, choosing_sum = 0;
    const float* moba_row = static_cast<const float*>(moba.data) + h * problem.total_q;
    const float* dense_row = static_cast<const float*>(dense.data) + h * problem.total_q;
    for (auto s = static_cast<std::size_t>(first_sequence); s < static_cast<std::size_t>(last_sequence); ++s) {
      const std::int64_t k_len = starts_k[s + 1] - starts_k[s];
      const std::int64_t first_position = k_len - (starts_q[s + 1] - starts_q[s]);
      for (std::int64_t row = starts_q[s]; row < starts_q[s + 1]; ++row) {
        // -inf against a finite lse: none of what the row attends to is in the chosen blocks.
        const bool none = moba_row[row] == -std::numeric_limits<float>::infinity();
        if (!std::isfinite(dense_row[row]) || !(std::isfinite(moba_row[row]) || none)) continue;
        // Rounding may put the kept part a hair above the whole.
        const double mass =
            std::min(1.0, std::exp(static_cast<double>(moba_row[row]) - static_cast<double>(dense_row[row])));
        sum += mass;
        ++head.rows;
        head.min = std::min(head.min, mass);
        if (blocks_in_reach(problem.config, first_position + row - starts_q[s], k_len) > problem.config.top_k) {
          choosing_sum += mass;
          ++head.choosing_rows;
        }
      }
    }
    if (head.rows > 0) head.mean = sum / static_cast<double>(head.rows);
    if (head.choosing_rows > 0) head.choosing_mean = choosing_sum / static_cast<double>(head.choosing_rows);
  }
  return heads;
}

void print_kept_mass(const std::vector<KeptMass>& heads) {
  const auto percent = [](double share, std::int64_t rows) {
    return rows == 0 ? std::string("-") : format("%.1f %%", 100 * share);
  };
  std::printf("share of the dense attention mass in the chosen blocks\n");
  std::printf("%-8s %10s %10s %16s\n", "head", "mean", "min", "mean, choosing");
  KeptMass all{.mean = 0};
  for (std::size_t h = 0; h < heads.size(); ++h) {
    const KeptMass& head = heads[h];
    std::printf("%-8zu %10s %10s %16s\n", h, percent(head.mean, head.rows).c_str(),
                percent(head.min, head.rows).c_str(), percent(head.choosing_mean, head.choosing_rows).c_str());
    all.rows += head.rows;
    all.mean += head.mean / static_cast<double>(heads.size());
  }
  std::printf("%-8s %10s\n", "all", percent(all.mean, all.rows).c_str());
  std::printf("choosing: the rows with more than top-k blocks in reach; the others keep everything\n");
}

}  // namespace moba::cli
