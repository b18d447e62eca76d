// parallel_for: every item once, on no more threads than it may have, whoever else calls; and nothing is left behind.
#include "parallel.h"

#include <unistd.h>

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

// With an arena of oneTBB's made for each call it was 7 KiB a call.
TEST(Parallel, CallsLeaveNothingBehind) {
  if (kSanitized) GTEST_SKIP() << "sanitizers keep what is freed";
  for (int call = 0; call < 100; ++call) EXPECT_TRUE(runs_well());
  const std::int64_t before = resident_bytes();
  for (int call = 0; call < 4000; ++call) EXPECT_TRUE(runs_well());
  EXPECT_LT(resident_bytes() - before, 4 << 20);
}

}  // namespace
}  // namespace moba::test
