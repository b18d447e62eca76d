// The only file that calls oneTBB.
//
// Distributions ship oneTBB without the thread sanitizer, which then sees neither the locks inside it nor what they
// order, and reports races by the dozen. So in that build this file is compiled without it (src/CMakeLists.txt) and
// tells it of the two orders that a call gives: what came before it comes before the workers, and they before what
// comes after it. Everything else that threads share is checked; the one suppression is of oneTBB itself
// (cmake/tsan.supp).
#include "parallel.h"

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

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

// Arenas that no call is in. They are kept: the oneTBB of Debian 12 (2021.8) does not free one that workers came to,
// and walks through all there ever were whenever work begins (after 40,000 calls with one each: 280 MiB, above 1 ms a
// call).
class Arenas {
 public:
  using Arena = std::unique_ptr<oneapi::tbb::task_arena>;

  Arena take(int threads) {
    const std::lock_guard lock(mutex_);
    if (free_ == nullptr) free_ = new std::vector<Arena>;
    const auto found = std::ranges::find_if(*free_, [&](const Arena& a) { return a->max_concurrency() == threads; });
    if (found == free_->end()) {
      free_->reserve(made_ + 1);  // so that none is lost for want of memory
      ++made_;
      return std::make_unique<oneapi::tbb::task_arena>(threads);
    }
    Arena arena = std::move(*found);
    free_->erase(found);
    return arena;
  }
  void give_back(Arena arena) {
    const std::lock_guard lock(mutex_);
    free_->push_back(std::move(arena));
  }

 private:
  std::mutex mutex_;
  std::vector<Arena>* free_ = nullptr;  // never destroyed: oneTBB may be gone by the time that it would be
  std::size_t made_ = 0;
};

// There before any code runs. (A static of a function has a guard, whose order the thread sanitizer would not see.)
constinit Arenas arenas;

class BorrowedArena {
 public:
  explicit BorrowedArena(int threads) : arena_(arenas.take(threads)) {}
  ~BorrowedArena() { arenas.give_back(std::move(arena_)); }
  BorrowedArena(const BorrowedArena&) = delete;
  BorrowedArena& operator=(const BorrowedArena&) = delete;
  oneapi::tbb::task_arena* operator->() const { return arena_.get(); }

 private:
  Arenas::Arena arena_;
};

}  // namespace

void run_workers(int threads, int workers, void (*work)(void* context, int slot), void* context) {
  char start = 0, end = 0;
  happens_before(start);
  // An arena that no other call is in keeps the call within its limit and apart from whatever else the process runs on
  // oneTBB. (It warns on stderr about one that is larger than what the process allows.)
  using Limit = oneapi::tbb::global_control;
  const auto allowed = static_cast<int>(Limit::active_value(Limit::max_allowed_parallelism));
  BorrowedArena arena(std::min(threads, allowed));
  // With the floating-point mode of this caller: an arena by itself has that of whoever was in it first.
  using Context = oneapi::tbb::task_group_context;
  Context context_of_caller(Context::isolated, Context::default_traits | Context::fp_settings);
  arena->execute([&] {
    oneapi::tbb::parallel_for(
        0, workers,
        [&](int slot) {
          happens_after(start);
          work(context, slot);
          happens_before(end);
        },
        oneapi::tbb::simple_partitioner(), context_of_caller);
  });
  happens_after(end);
}

}  // namespace moba
