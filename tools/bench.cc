// moba bench: times of a problem given as text, on random tensors.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>

#include "commands.h"
#include "machine.h"
#include "memory_use.h"
#include "moba/info.h"
#include "output_file.h"
#include "problem_text.h"
#include "random_inputs.h"
#include "stages.h"
#include "text.h"
#include "training.h"

namespace moba::cli {
namespace {

constexpr std::uint64_t kSeed = 20250218;

// The times of one stage over the repeats.
struct Samples {
  std::string name;
  double flop = 0;
  std::vector<double> seconds;

  double min() const { return *std::min_element(seconds.begin(), seconds.end()); }
  double median() const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t half = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }
  double flops() const { return min() > 0 ? flop / min() : 0.0; }  // a second
};

void add(std::vector<Samples>& samples, const std::vector<StageTime>& times) {
  if (samples.empty()) {
    for (const StageTime& time : times) samples.push_back({time.name, time.flop, {}});
  }
  for (std::size_t i = 0; i < times.size(); ++i) samples[i].seconds.push_back(times[i].seconds);
}

// One warm-up, then `repeat` timed passes.
std::vector<Samples> time_passes(int repeat, const Arithmetic& arithmetic,
                                 const std::function<std::vector<StageTime>()>& pass) {
  std::vector<Samples> samples;
  for (int i = -1; i < repeat; ++i) {
    std::vector<StageTime> times = pass();
    count_flop(times, arithmetic);
    if (i >= 0) add(samples, times);
  }
  return samples;
}

// Of the stages; the last entry is MoBA as a whole.
std::vector<Samples> time_stages(const Plan& plan, const Inputs& inputs, const Arithmetic& arithmetic, int repeat,
                                 Progress& progress) {
  StagedForward forward(plan, inputs);
  return time_passes(repeat, arithmetic, [&] {
    std::vector<StageTime> times = forward.run(progress);
    times.push_back({"total", total_seconds(times)});
    if (whole_differs(plan)) times.push_back(forward.run_whole(progress));
    return times;
  });
}

Samples time_dense(const Plan& plan, const Inputs& inputs, const Arithmetic& arithmetic, int repeat,
                   Progress& progress) {
  const Results results(plan);
  const PlacedMemory workspace(Place(plan), plan.workspace_bytes(), "the workspace");
  const auto pass = [&] {
    return std::vector<StageTime>{run_dense(plan, inputs, results.outputs, workspace.span(), progress)};
  };
  return time_passes(repeat, arithmetic, pass).front();
}

// Behind a forward that keeps its selection.
Samples time_backward(const Plan& plan, const Inputs& inputs, const Arithmetic& arithmetic, int repeat,
                      Progress& progress) {
  const Problem& p = plan.problem();
  Buffer memory;
  const PlacedTensor dout(Place(plan), random_tensor(memory, p.dtype, p.total_q, p.q_heads, p.head_dim, kSeed + 1),
                          "dout");
  Training training(plan, inputs, dout.tensor());
  return time_passes(repeat, arithmetic, [&] { return training.run(progress); }).back();
}

void print_table(const std::vector<Samples>& samples, const RateUnit& unit) {
  std::printf("%-8s %12s %12s %10s\n", "stage", "min", "median", unit.name);
  for (const Samples& stage : samples) {
    std::printf("%-8s %12s %12s %10s\n", stage.name.c_str(), format_seconds(stage.min()).c_str(),
                format_seconds(stage.median()).c_str(),
                stage.flop > 0 ? format("%.1f", stage.flops() / unit.flops).c_str() : "-");
  }
}

std::string to_json(const std::string& problem, const Plan& plan, int repeat, const std::vector<Samples>& samples) {
  nlohmann::ordered_json report{{"version", version()},
                                {"compiler", compiler()},
                                {"build_type", build_type()},
                                {"processor", processor_name()},
                                {"kernels", plan.kernels()},
                                {"threads", plan.threads()},
                                {"problem", problem},
                                {"repeat", repeat},
                                {"stages", nlohmann::ordered_json::array()}};
  for (const Samples& stage : samples) {
    report["stages"].push_back({{"name", stage.name},
                                {"min_s", stage.min()},
                                {"median_s", stage.median()},
                                {"flop", stage.flop},
                                {"gflops", stage.flops() * 1e-9}});
  }
  return report.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace

void bench(const BenchArguments& arguments) {
  if (!arguments.json.empty()) check_output(arguments.json);
  const TextProblem text = parse_problem(arguments.problem, arguments.options);
  const Plan plan(text.problem, text.options);
  const MemoryUse use = memory_use(plan);
  // What is timed later comes when the memory of what was before is free again.
  const double training = arguments.backward ? use.out + use.trained() : 0;
  require_memory(plan, {use.inputs(), std::max(use.staged(), training), 0, arguments.backward ? use.out : 0});

  std::printf("moba %s, %s, %s, %s, %d cores\n", version(), compiler().c_str(), build_type().c_str(),
              processor_name().c_str(), cores());
  std::printf("%s\n%s\n\n", plan.kernels().c_str(), describe(text).c_str());
  std::fflush(stdout);

  const std::vector<std::int64_t> starts_q = start_offsets(text.problem.batch, text.seqlen_q);
  const std::vector<std::int64_t> starts_k = start_offsets(text.problem.batch, text.seqlen_k);
  const Arithmetic arithmetic = plan.arithmetic(starts_q, starts_k);
  std::vector<Samples> samples;
  Samples moba;  // of these, forward as a whole
  {
    Progress progress;
    progress.stage("random tensors");
    const RandomInputs random(text.problem, starts_q, starts_k, kSeed);
    const PlacedInputs placed(plan, random.inputs);
    samples = time_stages(plan, placed.inputs(), arithmetic, arguments.repeat, progress);
    moba = samples.back();
    if (arguments.backward) {
      samples.push_back(time_backward(plan, placed.inputs(), arithmetic, arguments.repeat, progress));
    }
    if (arguments.dense) samples.push_back(time_dense(plan, placed.inputs(), arithmetic, arguments.repeat, progress));
  }
  print_table(samples, RateUnit(plan));
  if (whole_differs(plan)) std::printf("%s\n", kWholeDiffers);
  if (arguments.dense) {
    const Samples& dense = samples.back();
    std::printf("\ndense / MoBA: %.2f in time", dense.min() / moba.min());
    if (moba.flop > 0) std::printf(", %.2f in arithmetic", dense.flop / moba.flop);
    std::printf("\n");
  }
  if (arguments.json.empty()) return;
  OutputFile file(arguments.json);
  file.write(to_json(describe(text), plan, arguments.repeat, samples));
  file.commit();
}

}  // namespace moba::cli
