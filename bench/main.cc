// moba_bench: the figures of a backend.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>

#include "blas.h"
#include "cpu_figures.h"
#include "decode_figures.h"

int main(int argc, char** argv) {
  moba::bench::fit_blas_to_processor(argv);
  CLI::App app(
      "Measures the cpu backend and prints lines 'figure NAME VALUE UNIT' to stdout; the rest goes to stderr.");
  int threads = 0, repetitions = 7;
  app.add_option("--threads", threads, "threads for both the library and OpenBLAS; 0: one per core")
      ->capture_default_str();
  app.add_option("--repetitions", repetitions, "how often each is measured; the best counts")->capture_default_str();
  bool decode_only = false;
  app.add_flag("--decode", decode_only, "only the figures of decode over a cache");
  CLI11_PARSE(app, argc, argv);
  try {
    if (!decode_only) moba::bench::cpu_figures(threads, repetitions);
    moba::bench::decode_figures(threads, repetitions);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "moba_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
