// Problems by the thousand, from the rotation to the gradients: the cpu against the reference. Each is made from one
// number, its seed, and a failure prints that: MOBA_SEED=THAT in the environment runs that problem alone.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "trial.h"

namespace moba::test {
namespace {

constexpr int kParts = 8;  // for ctest to run side by side
constexpr int kProblems = kSanitized ? 24 : 256;

Trial trial_of(std::uint64_t seed) {
  Random random(seed);
  // A few of several tasks for a key head.
  const std::int64_t most_tokens = random.one_in(40) ? 900 : random.one_in(12) ? 200 : 64;
  return draw_trial([&](auto least, auto most) { return random.integer(least, most); }, most_tokens);
}

::testing::AssertionResult agrees(const Trial& trial) {
  try {
    return cpu_agrees(trial);
  } catch (const Error& error) {
    return ::testing::AssertionFailure() << error.what();
  }
}

class RandomProblems : public ::testing::TestWithParam<int> {};

TEST_P(RandomProblems, CpuAgreesWithTheReference) {
  const char* const wanted = std::getenv("MOBA_SEED");
  if (wanted != nullptr && GetParam() != 0) GTEST_SKIP() << "MOBA_SEED asks for one problem";
  const std::uint64_t first = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : std::random_device()();
  std::printf("first problem: MOBA_SEED=%llu\n", static_cast<unsigned long long>(first));  // should it end the process
  for (std::uint64_t seed = first; seed < first + (wanted != nullptr ? 1 : kProblems); ++seed) {
    const Trial trial = trial_of(seed);
    SCOPED_TRACE(::testing::Message() << trial << "\nto run it alone: MOBA_SEED=" << seed);
    ASSERT_TRUE(agrees(trial));
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Part, RandomProblems, ::testing::Range(0, kParts));

}  // namespace
}  // namespace moba::test
