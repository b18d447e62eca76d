#include "rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moba {
namespace {

constexpr double kTwoPi = 2.0 * std::numbers::pi;

// Llama 3.1: wavelengths that fit high_freq_factor times into the original context stay, those that fit less than
// low_freq_factor times are stretched by `factor`, linear in the number of fits between.
double llama3(const Rope& rope, double frequency) {
  const double fits = rope.original_max_position * frequency / kTwoPi;
  if (fits > rope.high_freq_factor) return frequency;
  if (fits < rope.low_freq_factor) return frequency / rope.factor;
  const double keep = (fits - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - keep) * frequency / rope.factor + keep * frequency;
}

// YaRN (arXiv 2309.00071): pairs below `low` stay, pairs above `high` are stretched by `factor`, linear between.
struct YarnRange {
  double low, high;
};

YarnRange yarn_range(const Rope& rope, double rotary_dim) {
  // The (fractional) pair that turns `rotations` times over the original context.
  const auto pair_of = [&](double rotations) {
    return rotary_dim * std::log(rope.original_max_position / (rotations * kTwoPi)) / (2.0 * std::log(rope.base));
  };
  const double low = std::max(std::floor(pair_of(rope.beta_fast)), 0.0);
  const double high = std::min(std::ceil(pair_of(rope.beta_slow)), rotary_dim - 1.0);
  return {low, low == high ? high + 0.001 : high};
}

double yarn(const Rope& rope, const YarnRange& range, int pair, double frequency) {
  const double stretch = std::clamp((pair - range.low) / (range.high - range.low), 0.0, 1.0);
  return frequency / rope.factor * stretch + frequency * (1.0 - stretch);
}

}  // namespace

RopeTable::RopeTable(const Rope& rope, std::int64_t head_dim)
    : pairs_((rope.rotary_dim != 0 ? rope.rotary_dim : head_dim) / 2), cos_(rope.cos), sin_(rope.sin) {
  if (cos_.given() && sin_.given()) return;
  const double rotary_dim = 2.0 * static_cast<double>(pairs_);
  const YarnRange range = rope.scaling == RopeScaling::yarn ? yarn_range(rope, rotary_dim) : YarnRange{};
  if (rope.scaling == RopeScaling::yarn) magnitude_ = rope.attention_factor.value_or(0.1 * std::log(rope.factor) + 1.0);
  for (int i = 0; i < pairs_; ++i) {
    const double frequency = std::pow(rope.base, -2.0 * i / rotary_dim);
    switch (rope.scaling) {
      case RopeScaling::none:
        frequency_[i] = frequency;
        break;
      case RopeScaling::linear:
        frequency_[i] = frequency / rope.factor;
        break;
      case RopeScaling::llama3:
        frequency_[i] = llama3(rope, frequency);
        break;
      case RopeScaling::yarn:
        frequency_[i] = yarn(rope, range, i, frequency);
        break;
    }
  }
  run_cos_.resize(static_cast<std::size_t>(kRun * pairs_));
  run_sin_.resize(run_cos_.size());
  for (std::int64_t row = 0; row < kRun; ++row) {
    for (std::int64_t i = 0; i < pairs_; ++i) {
      const double angle = static_cast<double>(row) * frequency_[i];
      run_cos_[row * pairs_ + i] = std::cos(angle);
      run_sin_[row * pairs_ + i] = std::sin(angle);
    }
  }
}

void RopeTable::rows(std::int64_t first, std::int64_t count, float* cos, float* sin) const {
  if (cos_.given() && sin_.given()) {
    for (std::int64_t row = 0; row < count; ++row) {
      std::copy_n(static_cast<const float*>(cos_.data) + (first + row) * cos_.stride[0], pairs_, cos + row * pairs_);
      std::copy_n(static_cast<const float*>(sin_.data) + (first + row) * sin_.stride[0], pairs_, sin + row * pairs_);
    }
    return;
  }
  for (std::int64_t position = first; position < first + count;) {
    const std::int64_t offset = (position % kRun + kRun) % kRun;  // of a negative position too
    const std::int64_t rows = std::min(first + count - position, kRun - offset);
    run_rows(position - offset, offset, offset + rows, cos + (position - first) * pairs_,
             sin + (position - first) * pairs_);
    position += rows;
  }
}

// Positions run + begin .. run + end, as rotations of `run` by the angles of begin .. end: two float64 roundings more
// than cos and sin of each angle, and 30 times as fast. `run` is a multiple of kRun, so a position has the same bits
// whichever rows are asked for.
void RopeTable::run_rows(std::int64_t run, std::int64_t begin, std::int64_t end, float* cos, float* sin) const {
  std::array<double, kMaxPairs> base_cos, base_sin;
  for (std::int64_t i = 0; i < pairs_; ++i) {
    const double angle = static_cast<double>(run) * frequency_[i];
    base_cos[i] = std::cos(angle) * magnitude_;
    base_sin[i] = std::sin(angle) * magnitude_;
  }
  for (std::int64_t row = begin; row < end; ++row, cos += pairs_, sin += pairs_) {
    const double* step_cos = run_cos_.data() + row * pairs_;
    const double* step_sin = run_sin_.data() + row * pairs_;
    for (std::int64_t i = 0; i < pairs_; ++i) {
      cos[i] = static_cast<float>(base_cos[i] * step_cos[i] - base_sin[i] * step_sin[i]);
      sin[i] = static_cast<float>(base_sin[i] * step_cos[i] + base_cos[i] * step_sin[i]);
    }
  }
}

}  // namespace moba
