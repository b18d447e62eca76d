// The one way work is shared among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moba {

// Calls work(context, slot) once for each slot in [0, workers), at the same time where threads are free. workers <=
// threads, which is the plan's number: what serves one call serves the next. parallel.cc
void run_workers(int threads, int workers, void (*work)(void* context, int slot), void* context);

// Calls f(i, slot) once for each i in [0, n), on at most `threads` threads. Items are handed out in ascending order,
// one at a time; `slot` in [0, threads) is held by one thread at a time, for scratch memory. f must not throw.
template <class F>
void parallel_for(int threads, std::int64_t n, F&& f) {
  const int workers = static_cast<int>(std::min<std::int64_t>(threads, n));
  if (workers <= 1) {
    for (std::int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
  std::atomic<std::int64_t> next = 0;
  // Relaxed: items are handed out, and nothing else is passed on with them. (A stronger order would also hide from the
  // thread sanitizer what one item writes and another reads.)
  auto work = [&](int slot) {
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (std::int64_t i = take(); i < n; i = take()) f(i, slot);
  };
  run_workers(
      threads, workers, [](void* context, int slot) { (*static_cast<decltype(work)*>(context))(slot); }, &work);
}

}  // namespace moba
