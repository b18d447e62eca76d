#include "progress.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace moba::cli {
namespace {

constexpr std::chrono::seconds kPatience{2};
constexpr std::chrono::milliseconds kTick{100};

bool on_terminal() {
  const char* terminal = std::getenv("TERM");
  return isatty(STDERR_FILENO) == 1 && terminal != nullptr && std::string_view(terminal) != "dumb";
}

double seconds(std::chrono::steady_clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

Progress::Progress(bool wanted) : begin_(Clock::now()), stage_begin_(begin_) {
  if (wanted && on_terminal()) thread_ = std::thread([this] { show_until_done(); });
}

Progress::~Progress() {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Progress::stage(const std::string& name) {
  const std::lock_guard lock(mutex_);
  stage_ = name;
  stage_begin_ = Clock::now();
}

void Progress::show_until_done() {
  std::unique_lock lock(mutex_);
  if (wake_.wait_for(lock, kPatience, [this] { return done_; })) return;
  do {
    const Clock::time_point now = Clock::now();
    std::fprintf(stderr, "\r\033[K%s: %.1f s (%.1f s in all)", stage_.c_str(), seconds(now - stage_begin_),
                 seconds(now - begin_));
    std::fflush(stderr);
  } while (!wake_.wait_for(lock, kTick, [this] { return done_; }));
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
}

}  // namespace moba::cli
