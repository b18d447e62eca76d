// moba info: what a bug report should say of the build and the machine.
#include "moba/info.h"

#include <cstdio>

#include "commands.h"
#include "machine.h"
#include "text.h"

namespace moba::cli {

namespace {

void line(const char* name, const std::string& value) { std::printf("%-11s %s\n", name, value.c_str()); }

void print_cuda(const CudaSupport& cuda) {
  if (!cuda.built) return line("cuda", cuda.problem);
  line("cuda", "built with CUDA " + cuda.runtime + ", " +
                   (cuda.driver.empty() ? "" : "the driver serves CUDA " + cuda.driver) +
                   (cuda.driver.empty() || cuda.problem.empty() ? "" : "; ") + cuda.problem);
  for (const CudaDevice& device : cuda.devices) {
    line("cuda device", std::to_string(device.index) + ": " + device.name + ", compute capability " +
                            std::to_string(device.major) + "." + std::to_string(device.minor) + ", " +
                            format_bytes(static_cast<double>(device.memory)) + ", kernels " + device.kernels);
  }
}

// Plans something small, which every backend serves, so that what stands in the way is said.
void check_options(const Options& options) {
  Problem problem;
  problem.dtype = DType::bf16;
  problem.total_q = problem.total_k = 256;
  problem.config.top_k = 1;
  const Plan plan(problem, options);
}

}  // namespace

void info(const Options& options) {
  const Bf16Support bf16 = bf16_support();
  std::string targets;
  for (const std::string& target : cpu_targets()) targets += (targets.empty() ? "" : " ") + target;

  line("version", version());
  line("compiler", compiler());
  line("build type", build_type());
  line("system", operating_system());
  line("processor", processor_name());
  line("cores", std::to_string(cores()));
  line("memory", format_bytes(memory_bytes()));
  line("cpu targets", targets);
  line("bf16 dot", !bf16.available  ? "not available"
                   : bf16.preferred ? "available, preferred"
                                    : "available, not preferred: widening is the faster here");
  const CudaSupport cuda = cuda_support();
  line("backends", cuda.devices.empty() ? "cpu reference" : "cpu reference cuda");
  print_cuda(cuda);
  check_options(options);
}

}  // namespace moba::cli
