// The order in which the tasks of backward add their shares of dk and dv to the sums: always the same one, whoever is
// ready first, so that the sums have the same bits on any number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>

namespace moba::cpu {

// The turns of one task among the tasks of its key head, which are numbered in the order in which they are handed out
// and all walk the keys of the batch in ascending order: a task adds to keys when the one before it is past them. Who
// waits therefore waits for a task that some thread has begun, and the first of those waits for nobody.
class Turns {
 public:
  // passed: [tasks of the key head], zeros before the first task begins; `task` counts from 0.
  Turns(std::int64_t* passed, std::int64_t task) : own_(passed + task), before_(task > 0 ? own_ - 1 : nullptr) {}

  // Returns when it is this task's turn to add to the keys before `end`, a key of the batch.
  void wait(std::int64_t end) const {
    if (before_ == nullptr) return;
    while (std::atomic_ref(*before_).load(std::memory_order_acquire) < end) std::this_thread::yield();
  }
  // After wait(end) and what was added: leaves them to the next task.
  void pass(std::int64_t end) const { std::atomic_ref(*own_).store(end, std::memory_order_release); }
  // There is nothing more to add.
  void finish() const {
    wait(kAll);
    pass(kAll);
  }

 private:
  static constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();

  std::int64_t *own_, *before_;
};

}  // namespace moba::cpu
