// The one way work is shared among threads.
#pragma once

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moba {

// Calls f(i, slot) once for each i in [0, n), on at most `threads` threads. Items are handed out in ascending order,
// one at a time; `slot` in [0, threads) is held by one thread at a time, for scratch memory. f must not throw. An arena
// of its own keeps the call within its limit and apart from whatever else the process runs on oneTBB.
template <class F>
void parallel_for(int threads, std::int64_t n, F&& f) {
  // oneTBB warns on stderr about an arena larger than what the process allows it.
  using Limit = oneapi::tbb::global_control;
  const auto allowed = static_cast<std::int64_t>(Limit::active_value(Limit::max_allowed_parallelism));
  const int workers = static_cast<int>(std::min({std::int64_t{threads}, n, allowed}));
  if (workers <= 1) {
    for (std::int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
  std::atomic<std::int64_t> next = 0;
  oneapi::tbb::task_arena arena(workers);
  arena.execute([&] {
    oneapi::tbb::parallel_for(
        0, workers,
        [&](int slot) {
          for (std::int64_t i = next++; i < n; i = next++) f(i, slot);
        },
        oneapi::tbb::simple_partitioner());
  });
}

}  // namespace moba
