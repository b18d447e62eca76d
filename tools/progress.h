// What is being done and for how long, on a terminal's last line, once it takes longer than two seconds.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace moba::cli {

// Shows the current stage on stderr from the third second on, and nothing when stderr is not a terminal. The line is
// cleared when the object goes.
class Progress {
 public:
  explicit Progress(bool wanted = true);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void stage(const std::string& name);

 private:
  using Clock = std::chrono::steady_clock;

  void show_until_done();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::string stage_;
  Clock::time_point begin_, stage_begin_;
  bool done_ = false;
  std::thread thread_;  // last: it uses what stands above
};

}  // namespace moba::cli
