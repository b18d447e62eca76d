#include "blas.h"

#include <cblas.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <set>
#include <stdexcept>

#include "moba/info.h"

namespace moba::bench {

void fit_blas_to_processor(char** argv) {
  constexpr const char* kChosen = "OPENBLAS_CORETYPE";
  if (std::getenv(kChosen) != nullptr) return;
  const std::set<std::string> avx512 = {"SkylakeX", "Cooperlake", "SapphireRapids"};
  const std::set<std::string> avx2 = {"Haswell", "Zen"};
  const std::string best = cpu_targets().front(), now = blas_kernels();
  const bool has_avx512 = best.starts_with("AVX3"), has_avx2 = best == "AVX2";
  const bool fits = has_avx512 ? avx512.contains(now) : !has_avx2 || avx2.contains(now);
  if (fits) return;
  setenv(kChosen, has_avx512 ? "SkylakeX" : "Haswell", 1);
  execv("/proc/self/exe", argv);  // returns only where it fails: then the kernels stay as they are
}

std::string blas_kernels() { return openblas_get_corename(); }

Sgemm::Sgemm(int threads) : a_(kCount), b_(kCount), c_(kCount) {
  openblas_set_num_threads(threads);
  for (std::size_t i = 0; i < kCount; ++i) {
    a_[i] = static_cast<float>(i % 251) / 251.0f - 0.5f;
    b_[i] = static_cast<float>(i % 241) / 241.0f - 0.5f;
  }
  run();
  for (const std::size_t row : {0, 1000, kSize - 1}) {
    for (const std::size_t column : {0, 777, kSize - 1}) {
      double sum = 0;
      for (std::size_t k = 0; k < kSize; ++k) sum += double{a_[row * kSize + k]} * b_[k * kSize + column];
      if (std::fabs(sum - c_[row * kSize + column]) > 1e-2) {
        throw std::runtime_error("OpenBLAS sgemm gave a wrong product");
      }
    }
  }
}

void Sgemm::run() {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kSize, kSize, kSize, 1.0f, a_.data(), kSize, b_.data(), kSize,
              0.0f, c_.data(), kSize);
}

}  // namespace moba::bench
