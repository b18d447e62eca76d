#include "memory_peak.h"

#include <fstream>
#include <string>

namespace moba::bench {

namespace {

// A line of /proc/self/status, in bytes.
double status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    double kib = 0;
    if (word == key + ":" && status >> kib) return kib * 1024;
  }
  return -1;
}

// Sets the peak back to what is resident now.
bool reset_peak() {
  std::ofstream clear("/proc/self/clear_refs");
  return static_cast<bool>(clear << 5 << std::flush);
}

}  // namespace

double peak_extra_bytes(const std::function<void()>& run) {
  if (!reset_peak()) return -1;
  const double before = status_bytes("VmRSS");
  run();
  const double peak = status_bytes("VmHWM");
  return before < 0 || peak < 0 ? -1 : peak - before;
}

}  // namespace moba::bench
