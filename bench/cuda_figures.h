// The figures of the cuda backend.
#pragma once

#include <string>
#include <vector>

#include "moba/info.h"

namespace moba::bench {

struct CudaFigureOptions {
  std::vector<std::string> names;  // of problems; none: all of them, or with `quick` those that have a time to be held
  bool quick = false;              // and no times under continuous load
  std::string kernels;             // the family for all problems, as Options::cuda_kernels
};

std::vector<std::string> cuda_problem_names();

// Prints lines "figure cuda.PROBLEM.WHAT VALUE UNIT" to stdout, and tables for people to stderr.
void cuda_figures(const CudaDevice& device, const CudaFigureOptions& options);

}  // namespace moba::bench
