// Google Benchmark as a stopwatch: several things timed in turn, over and over, and the best time of each.
#pragma once

#include <functional>
#include <map>
#include <string>

namespace moba::bench {

// Things to time, by name. They run in an order that is shuffled over the repetitions, so that a machine that slows
// down for a while slows all of them.
using Timed = std::map<std::string, std::function<void()>>;

// Seconds of the fastest of `repetitions` of each; Google Benchmark's own table goes to stderr.
std::map<std::string, double> best_seconds(const Timed& things, int repetitions);

}  // namespace moba::bench
