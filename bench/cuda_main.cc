// moba_bench_cuda: the figures of the cuda backend. A program of its own, so that it runs where there is a GPU and
// neither OpenBLAS nor Google Benchmark.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>

#include "cuda_figures.h"

int main(int argc, char** argv) {
  CLI::App app(
      "Measures the cuda backend and prints lines 'figure NAME VALUE UNIT' to stdout; the rest goes to stderr.");
  moba::bench::CudaFigureOptions options;
  int index = -1;
  bool list = false;
  app.add_option("PROBLEM", options.names, "problems to measure; none: all. See --list")
      ->check(CLI::IsMember(moba::bench::cuda_problem_names()));
  app.add_flag("--quick", options.quick, "only problems with a target (if none are named), and no continuous load");
  app.add_option("--kernels", options.kernels, "kernel family for all problems; none: the best that the device has")
      ->check(CLI::IsMember({"sm90", "portable"}));
  app.add_option("--device", index, "GPU, as the driver counts them; none: the first that can be used")
      ->check(CLI::NonNegativeNumber);
  app.add_flag("--list", list, "print the names of the problems, and measure nothing");
  CLI11_PARSE(app, argc, argv);
  if (list) {
    for (const std::string& name : moba::bench::cuda_problem_names()) std::printf("%s\n", name.c_str());
    return 0;
  }
  try {
    const moba::CudaSupport support = moba::cuda_support();
    const auto device = std::find_if(support.devices.begin(), support.devices.end(),
                                     [&](const moba::CudaDevice& one) { return index < 0 || one.index == index; });
    if (device == support.devices.end()) {
      std::string why = support.problem;
      if (why.empty()) why = "--device: is " + std::to_string(index) + "; allowed: the devices that moba info lists";
      std::fprintf(stderr, "moba_bench_cuda: %s\n", why.c_str());
      return 1;
    }
    std::fprintf(stderr, "moba %s, %s, CUDA %s, driver for CUDA %s\n", moba::version(), device->name.c_str(),
                 support.runtime.c_str(), support.driver.c_str());
    moba::bench::cuda_figures(*device, options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "moba_bench_cuda: %s\n", error.what());
    return 1;
  }
  return 0;
}
