#include "blas.h"

#include <cblas.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "moba/info.h"

namespace moba::bench {

void fit_blas_to_processor(char** argv) {
  constexpr const char* kChosen = "OPENBLAS_CORETYPE";
  if (std::getenv(kChosen) != nullptr) return;
  const std::string best = cpu_targets().front();
  const char* kernels = best == "AVX3" ? "SkylakeX" : best == "AVX2" ? "Haswell" : nullptr;
  if (kernels == nullptr || blas_kernels() == kernels) return;
  setenv(kChosen, kernels, 1);
  execv("/proc/self/exe", argv);  // returns only where it fails: then the kernels stay as they are
}

std::string blas_kernels() { return openblas_get_corename(); }

Sgemm::Sgemm(int threads) {
  openblas_set_num_threads(threads);
  constexpr std::size_t kCount = std::size_t{kSize} * kSize;
  a_ = new float[kCount], b_ = new float[kCount], c_ = new float[kCount];
  for (std::size_t i = 0; i < kCount; ++i) {
    a_[i] = static_cast<float>(i % 251) / 251.0f - 0.5f;
    b_[i] = static_cast<float>(i % 241) / 241.0f - 0.5f;
  }
  run();
  for (const int row : {0, 1000, kSize - 1}) {
    for (const int column : {0, 777, kSize - 1}) {
      double sum = 0;
      for (int k = 0; k < kSize; ++k) sum += double{a_[row * kSize + k]} * b_[k * kSize + column];
      if (std::fabs(sum - c_[row * kSize + column]) > 1e-2)
        throw std::runtime_error("OpenBLAS sgemm gave a wrong product");
    }
  }
}

Sgemm::~Sgemm() {
  delete[] a_;
  delete[] b_;
  delete[] c_;
}

void Sgemm::run() {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kSize, kSize, kSize, 1.0f, a_, kSize, b_, kSize, 0.0f, c_,
              kSize);
}

}  // namespace moba::bench
