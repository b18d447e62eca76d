// Cosines and sines of the rotary position embedding, one row per position, the same bits for every backend.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "moba/config.h"

namespace moba {

// Rows computed from base and scaling, or read from the table of the caller, if there is one.
class RopeTable {
 public:
  static constexpr int kMaxPairs = 128;     // head_dim <= 256
  static constexpr std::int64_t kRun = 64;  // positions that share one evaluation of cos and sin

  RopeTable(const Rope& rope, std::int64_t head_dim);

  // Pairs of dimensions that are rotated: rotary_dim / 2.
  std::int64_t pairs() const { return pairs_; }

  // Radians per position of a pair, and the factor on cos and sin; without a table of the caller's.
  double frequency(std::int64_t pair) const { return frequency_[static_cast<std::size_t>(pair)]; }
  double magnitude() const { return magnitude_; }

  // cos and sin, [count][pairs()] each, of positions first .. first + count. They must be rows of the caller's table
  // or, without one, may be any numbers, negative too. May be called from many threads.
  void rows(std::int64_t first, std::int64_t count, float* cos, float* sin) const;

 private:
  void run_rows(std::int64_t run, std::int64_t begin, std::int64_t end, float* cos, float* sin) const;

  std::int64_t pairs_;
  double magnitude_ = 1.0;                     // factor on cos and sin
  std::array<double, kMaxPairs> frequency_{};  // radians per position of each pair
  std::vector<double> run_cos_, run_sin_;      // [kRun][pairs]: the angles of positions 0 .. kRun - 1
  ConstTensor cos_, sin_;                      // the caller's
};

}  // namespace moba
