// The yardstick: OpenBLAS's float32 matrix product, with the kernels that fit the processor.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace moba::bench {

// OpenBLAS chooses its kernels when it is loaded, and takes generic ones on a processor it is too old to know. Where
// that would happen this runs the program again, once, with OPENBLAS_CORETYPE set to the kernels of the instruction
// set. Call first in main.
void fit_blas_to_processor(char** argv);

// "SkylakeX", as OpenBLAS calls the kernels it uses.
std::string blas_kernels();

// C = A B for matrices of kSize x kSize, all float32. Throws std::runtime_error from the constructor if the product is
// wrong.
class Sgemm {
 public:
  static constexpr int kSize = 2048;
  static constexpr double kFlops = 2.0 * kSize * kSize * kSize;

  explicit Sgemm(int threads);
  void run();

 private:
  static constexpr std::size_t kCount = std::size_t{kSize} * kSize;

  std::vector<float> a_, b_, c_;
};

}  // namespace moba::bench
