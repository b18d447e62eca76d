// Forward and backward of the cuda backend on host tensors, and those who judge the gradients.
#pragma once

#include <optional>

#include "cuda_test.h"

namespace moba::test {

// A case with what forward and backward read of it.
struct Given {
  Case c;
  Data data;
  Array dout;

  explicit Given(Case given);
};

// What forward and backward made of that, over one choice.
struct Trained {
  std::optional<Chosen> chosen;  // none: all keys
  Attention results;
  Slopes slopes;
};

// By forward, which keeps its choice; by dense and dense_backward; by attend over a choice of anybody's.
Trained train(CudaRunner& run, const Given& given);
Trained train_dense(CudaRunner& run, const Given& given);
Trained train_on(CudaRunner& run, const Given& given, const Chosen& chosen);

// A workspace_limit for forward and backward: the least that both can do with, and so many hundredths of the way to
// what a plan without a limit takes.
std::size_t training_limit(const Problem& problem, const std::string& family, int hundredths);
// Whether a plan's backward goes by slabs of tokens, over which it sums up dk and dv, and in each, as dense_backward in
// its own, by several passes.
bool has_slabs_and_passes(const Plan& plan);

// The gradients of the same choice, out and lse: in float64, the rope turned back where the case has one; and by the
// CpuJudge, for cases without a rope.
reference::GradientRows f64_gradients(const Given& given, const Trained& trained);
reference::GradientRows cpu_gradients(const Given& given, const Trained& trained);

// Every row within docs/spec.md section 11 and every tensor within the same bound of its norm; zeros where a row has no
// key and where no row attends to a key. Notes the worst for the summary that the program ends with. `extra`: see
// close() (../support.h).
::testing::AssertionResult near(const Given& given, const Trained& trained, const reference::GradientRows& expected,
                                double extra = 0);

// |got - expected| / |expected| of the whole tensors; 0 where elements of what is expected are below 1e-4 on average
// (root mean square), 0 itself or what is left of terms that cancel.
struct TensorErrors {
  double dq = 0, dk = 0, dv = 0;
};
TensorErrors tensor_errors(const Slopes& got, const reference::GradientRows& expected);

}  // namespace moba::test
