// What a stage has to compute and to move, and how fast the machine could.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moba/plan.h"

namespace moba::bench {

// What a machine was seen to reach at best.
struct Roofline {
  double flops = 0;  // a second, matrix products of bfloat16
  double bytes = 0;  // a second, read and written

  double seconds(double flop, double byte) const;
};

// NVIDIA H200; nothing for other devices, which were not measured.
std::optional<Roofline> roofline_of(const std::string& device);

// Arithmetic that the result needs, and bytes of device memory that cannot be done without: every input once, every
// result once, and between the stages what they hand on. Rows of q that attend gathers again come from the cache.
struct Amount {
  double flop = 0;
  double byte = 0;
};

// The stages of "forward", "backward" and "training" that have an amount; of all else, itself.
std::vector<std::string> stages_of(const std::string& call);

// Of those stages of a causal batch whose queries and keys have the same lengths, by name ("rope": nothing where there
// is none); of those calls, which are their sums; of "dense" and "dense_backward".
std::map<std::string, Amount> amounts(const Plan& plan, const std::vector<std::int64_t>& starts);

}  // namespace moba::bench
