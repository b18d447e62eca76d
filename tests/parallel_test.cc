// parallel_for: every item once, on no more threads than it may have, whoever else calls; and nothing is left behind.
#include "parallel.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <fstream>
#include <thread>

#include "support.h"

namespace moba::test {
namespace {

// Memory of the process that is in use, as Linux says it.
std::int64_t resident_bytes() {
  std::int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// Runs 100 items. Whether each was taken once, by one of three slots that no other item had at the time.
bool runs_well() {
  std::vector<std::atomic<int>> items(100), slots(3);
  std::atomic<bool> good = true;
  parallel_for(3, 100, [&](std::int64_t i, int slot) {
    if (slot < 0 || slot >= 3) {
      good = false;
      return;
    }
    if (slots[static_cast<std::size_t>(slot)]++ != 0) good = false;
    ++items[static_cast<std::size_t>(i)];
    --slots[static_cast<std::size_t>(slot)];
  });
  return good && std::ranges::all_of(items, [](const std::atomic<int>& item) { return item == 1; });
}

TEST(Parallel, CallsAtTheSameTimeDoNotMeet) {
  std::vector<std::thread> callers;
  callers.reserve(4);
  std::atomic<int> bad = 0;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int call = 0; call < (kSanitized ? 50 : 500); ++call) bad += !runs_well();
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(bad, 0);
}

#if defined(__x86_64__)
// A caller that flushes subnormal numbers to zero does not change what the next one gets.
TEST(Parallel, CallsHaveTheFloatingPointModeOfTheirCaller) {
  const auto subnormal_items = [] {
    std::atomic<int> subnormal = 0;
    parallel_for(5, 100, [&](std::int64_t, int) {
      volatile float tiny = 1e-38f;
      tiny = tiny * 0.1f;
      if (tiny != 0.0f) ++subnormal;
    });
    return subnormal.load();
  };
  std::thread([&] {
    _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
    for (int i = 0; i < 10; ++i) EXPECT_EQ(subnormal_items(), 0);
  }).join();
  for (int i = 0; i < 10; ++i) EXPECT_EQ(subnormal_items(), 100);
}
#endif

// With an arena of oneTBB's made for each call it was 7 KiB a call.
TEST(Parallel, CallsLeaveNothingBehind) {
  if (kSanitized) GTEST_SKIP() << "sanitizers keep what is freed";
  const auto call_with_many_counts = [](int calls) {
    for (int call = 0; call < calls; ++call) {
      EXPECT_TRUE(runs_well());
      parallel_for(64, 1 + call % 64, [](std::int64_t, int) {});
    }
  };
  call_with_many_counts(100);
  const std::int64_t before = resident_bytes();
  call_with_many_counts(4000);
  EXPECT_LT(resident_bytes() - before, 4 << 20);
}

}  // namespace
}  // namespace moba::test
