// Step 7, merge: attention over a union of key sets from the results over each of them.
#include <cmath>
#include <limits>

#include "reference/access.h"

namespace moba::reference {
namespace {

double lse_of(const Outputs& partial, std::int64_t head, std::int64_t token) {
  return static_cast<const float*>(partial.lse.data)[at(partial.lse, head, token)];
}

// ln of the sum of exp(lse): what the lse over all the keys is.
double total_lse(std::span<const Outputs> partials, std::int64_t head, std::int64_t token) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  double most = kNone, sum = 0.0;
  bool none = true;
  for (const Outputs& partial : partials) {
    const double lse = lse_of(partial, head, token);
    most = lse > most ? lse : most;
    none = none && lse == kNone;
  }
  if (none) return kNone;
  for (const Outputs& partial : partials) sum += std::exp(lse_of(partial, head, token) - most);
  return most + std::log(sum);
}

}  // namespace

void merge(const Call& call, std::span<const Outputs> partials, const Outputs& outputs) {
  const Problem& problem = call.plan.problem;
  std::vector<double> out(static_cast<std::size_t>(problem.head_dim));
  for (std::int64_t token = 0; token < problem.total_q; ++token) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const double lse = total_lse(partials, head, token);
      out.assign(out.size(), 0.0);
      for (const Outputs& partial : partials) {
        const double part = lse_of(partial, head, token);
        if (part == -std::numeric_limits<double>::infinity()) continue;  // saw no key: its out means nothing
        const double weight = std::exp(part - lse);
        for (std::int64_t c = 0; c < problem.head_dim; ++c) out[c] += weight * load(partial.out, token, head, c);
      }
      for (std::int64_t c = 0; c < problem.head_dim; ++c)
        store(outputs.out, token, head, c, static_cast<float>(out[c]));
      if (outputs.lse.given()) {
        static_cast<float*>(outputs.lse.data)[at(outputs.lse, head, token)] = static_cast<float>(lse);
      }
    }
  }
}

}  // namespace moba::reference
