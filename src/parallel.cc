// The only file that calls oneTBB.
//
// Distributions ship oneTBB without the thread sanitizer, which then sees neither the locks inside it nor what they
// order, and reports races by the dozen. So in that build this file is compiled without it (src/CMakeLists.txt) and
// tells it of the two orders that a call gives: what came before it comes before the workers, and they before what
// comes after it. Everything else that threads share is checked, with no suppression.
#include "parallel.h"

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>

#ifdef MOBA_TSAN
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace moba {

namespace {

void happens_before([[maybe_unused]] char& event) {
#ifdef MOBA_TSAN
  __tsan_release(&event);
#endif
}

void happens_after([[maybe_unused]] char& event) {
#ifdef MOBA_TSAN
  __tsan_acquire(&event);
#endif
}

}  // namespace

void run_workers(int workers, void (*work)(void* context, int slot), void* context) {
  char start = 0, end = 0;
  happens_before(start);
  // An arena of its own keeps the call within its limit and apart from whatever else the process runs on oneTBB.
  // (It warns on stderr about one that is larger than what the process allows.)
  using Limit = oneapi::tbb::global_control;
  const auto allowed = static_cast<int>(Limit::active_value(Limit::max_allowed_parallelism));
  oneapi::tbb::task_arena arena(std::min(workers, allowed));
  arena.execute([&] {
    oneapi::tbb::parallel_for(
        0, workers,
        [&](int slot) {
          happens_after(start);
          work(context, slot);
          happens_before(end);
        },
        oneapi::tbb::simple_partitioner());
  });
  happens_after(end);
}

}  // namespace moba
