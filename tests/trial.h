// A random problem, made from numbers that anything may supply (a seed, the bytes of a fuzzer), and the judgement
// whether the cpu computes it as the reference does.
#pragma once

#include <functional>
#include <iosfwd>

#include "cache_support.h"

namespace moba::test {

// A number from `least` to `most`, both included.
using Draw = std::function<std::int64_t(std::int64_t least, std::int64_t most)>;

enum class Values {
  noise,
  whole_numbers,    // -1, 0 and 1: scores are exact, and many tie
  equal_keys,       // one key again and again
  repeated_blocks,  // every block holds the keys of the first
  large_scores,     // up to some thousands: a row attends to one key
};

struct Trial {
  Case c;
  Values values = Values::noise;
  Options options;  // of the cpu
  // Where the case is a prompt (causal, as many queries as keys): it is fed to a cache of this form in chunks up to
  // this.
  CacheCase cache;
  std::int64_t chunk = 1;
};
std::ostream& operator<<(std::ostream& stream, const Trial& trial);

// Sequences of up to so many tokens.
Trial draw_trial(const Draw& draw, std::int64_t most_tokens);
Data data_of(const Trial& trial);

// From the rotation to the gradients, and over a cache: the same bits where docs/spec.md promises them, the reference's
// selection but for rounding, out, lse and gradients within its bounds. Says what is not so.
::testing::AssertionResult cpu_agrees(const Trial& trial);

}  // namespace moba::test
