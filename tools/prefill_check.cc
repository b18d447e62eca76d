#include "prefill_check.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "accuracy.h"
#include "float64.h"
#include "moba/info.h"
#include "numeric.h"

namespace moba::cli {
namespace {

// Elements that are not finite on both sides are alike; such a row counts.
double row_error(const ConstTensor& x, const ConstTensor& expected, std::int64_t row, std::int64_t& not_finite) {
  const std::int64_t d = x.shape[2];
  bool finite = true;
  double difference = 0, size = 0;
  for (std::int64_t i = row * d; i < (row + 1) * d; ++i) {
    const double is = double{load_float(x.data, x.dtype, i)}, wanted = double{load_float(expected.data, x.dtype, i)};
    if (!std::isfinite(is) && !std::isfinite(wanted)) {
      finite = false;
      continue;
    }
    difference += (is - wanted) * (is - wanted);
    size += wanted * wanted;
  }
  not_finite += finite ? 0 : 1;
  if (difference == 0) return 0;
  return std::isfinite(difference) ? std::sqrt(difference / size) : std::numeric_limits<double>::infinity();
}

bool pair_products(const Plan& plan) {
  const Options& options = plan.options();
  if (plan.problem().dtype != DType::bf16 || options.backend != Backend::cpu) return false;
  return options.bf16_products == Bf16Products::dot ||
         (options.bf16_products == Bf16Products::automatic && bf16_support().preferred);
}

// Two roundings of the same row of ordinary size, a unit in the last place apart at most; and what the rounding of its
// scores leaves, which grows with them. Pair products of bfloat16, which a single token does not use, may be off by
// twice what they are from the reference.
double allowed_error(const Plan& plan, const Inputs& rotated) {
  const Problem& p = plan.problem();
  const double scores = std::abs(*p.config.scale) * longest_row(rotated.q) * longest_row(rotated.k);
  const double rounding = pair_products(plan)     ? 2e-2
                          : p.dtype == DType::f32 ? 1e-6
                          : p.dtype == DType::f16 ? 1e-3
                                                  : 8e-3;
  return rounding + 4 * 0x1p-24 * scores;
}

}  // namespace

PrefillCheck check_against_prefill(const Plan& plan, const StagedForward& forward, const Replayed& replayed) {
  PrefillCheck check;
  check.rows = replayed.out.shape[0] * replayed.out.shape[1];
  check.same_ids = equal_rows(replayed.ids, forward.selection().ids);
  for (std::int64_t row = 0; row < check.rows; ++row) {
    check.error = std::max(check.error, row_error(replayed.out, forward.outputs().out, row, check.not_finite));
  }
  check.allowed = allowed_error(plan, forward.rotated());
  return check;
}

}  // namespace moba::cli
