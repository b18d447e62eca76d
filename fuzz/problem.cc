// A whole small problem: the cpu must agree with the reference, from the rotation to the gradients and over a cache.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstdlib>
#include <iostream>

#include "trial.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  testing::GTEST_FLAG(throw_on_failure) = true;  // what the tests' support expects is expected here too
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider bytes(data, size);
  const moba::test::Trial trial = moba::test::draw_trial(
      [&](std::int64_t least, std::int64_t most) { return bytes.ConsumeIntegralInRange(least, most); }, 40);
  const testing::AssertionResult result = moba::test::cpu_agrees(trial);
  if (result) return 0;
  std::cerr << trial << "\n" << result.message() << std::endl;
  std::abort();
}
