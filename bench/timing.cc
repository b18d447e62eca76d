#include "timing.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <thread>

namespace moba::bench {

namespace {

// Prints the usual table and keeps the best time of each benchmark.
class BestTimes : public benchmark::ConsoleReporter {
 public:
  BestTimes() : ConsoleReporter(OO_Tabular) {}

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration) continue;
      const double seconds = run.real_accumulated_time / static_cast<double>(run.iterations);
      const auto [entry, first] = best_.emplace(run.run_name.function_name, seconds);
      if (!first) entry->second = std::min(entry->second, seconds);
    }
    ConsoleReporter::ReportRuns(runs);
  }

  std::map<std::string, double> best() const { return best_; }

 private:
  std::map<std::string, double> best_;
};

}  // namespace

std::map<std::string, double> best_seconds(const Timed& things, int repetitions) {
  for (const auto& thing : things) {
    benchmark::RegisterBenchmark(thing.first.c_str(),
                                 [&run = thing.second](benchmark::State& state) {
                                   for (auto _ : state) run();
                                   // Threads of OpenBLAS spin on for a while, and would take half of what runs next on
                                   // the same cores.
                                   std::this_thread::sleep_for(std::chrono::milliseconds(200));
                                 })
        ->Repetitions(repetitions)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond)
        ->MinTime(0.25);
  }
  std::string program = "moba_bench", interleave = "--benchmark_enable_random_interleaving=true";
  char* arguments[] = {program.data(), interleave.data(), nullptr};
  int count = 2;
  benchmark::Initialize(&count, arguments);
  BestTimes reporter;
  reporter.SetOutputStream(&std::cerr);
  reporter.SetErrorStream(&std::cerr);
  benchmark::RunSpecifiedBenchmarks(&reporter);
  benchmark::ClearRegisteredBenchmarks();
  return reporter.best();
}

}  // namespace moba::bench
