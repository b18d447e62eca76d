// How much memory a call really takes.
#pragma once

#include <functional>

namespace moba::bench {

// Bytes by which the resident memory of the process rises above where it stands, at most, while `run` runs; or -1 where
// the system does not tell (it takes Linux's /proc/self/clear_refs).
double peak_extra_bytes(const std::function<void()>& run);

}  // namespace moba::bench
