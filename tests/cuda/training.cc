#include "training.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <mutex>

#include "cuda/setup.h"

namespace moba::test {

namespace {

// What the program ends with: the worst of all that near() has seen.
struct Summary {
  std::mutex mutex;
  std::map<DType, TensorErrors> worst;
};

Summary& summary() {
  static Summary the_one;
  return the_one;
}

class PrintSummary : public ::testing::Environment {
 public:
  void TearDown() override {
    for (const auto& [dtype, worst] : summary().worst) {
      std::printf("summary: %s, worst error of a gradient dq %.2e, dk %.2e, dv %.2e\n", name(dtype), worst.dq, worst.dk,
                  worst.dv);
    }
  }
};
const ::testing::Environment* const kPrintSummary = ::testing::AddGlobalTestEnvironment(new PrintSummary);

void note(DType dtype, const TensorErrors& errors) {
  const std::lock_guard lock(summary().mutex);
  TensorErrors& worst = summary().worst[dtype];
  for (double TensorErrors::*const of : {&TensorErrors::dq, &TensorErrors::dk, &TensorErrors::dv}) {
    worst.*of = std::max(worst.*of, errors.*of);
  }
}

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double one : x) sum += one * one;
  return std::sqrt(sum);
}

double relative_error(const Array& got, const std::vector<double>& expected) {
  std::vector<double> error = got.numbers();
  for (std::size_t i = 0; i < error.size(); ++i) error[i] -= expected[i];
  const double size = norm(expected);
  return size <= 1e-4 * std::sqrt(static_cast<double>(expected.size())) ? 0 : norm(error) / size;
}

bool is_zero(const double* row, std::int64_t d) {
  return std::all_of(row, row + d, [](double x) { return x == 0; });
}

// Rows of x [tokens, heads, d] that hold something else than zeros where `empty` says that they may not.
template <class Empty>
::testing::AssertionResult zeros(const char* name, const Array& x, const Empty& empty) {
  const std::vector<double> numbers = x.numbers();
  const std::int64_t heads = x.dim(1), d = x.dim(2);
  for (std::int64_t row = 0; row < x.dim(0) * heads; ++row) {
    if (!empty(row / heads, row % heads) || is_zero(&numbers[row * d], d)) continue;
    return ::testing::AssertionFailure() << name << ", token " << row / heads << ", head " << row % heads
                                         << ": not all zeros";
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult zeros(const Trained& trained, const reference::GradientRows& expected) {
  const Slopes& got = trained.slopes;
  const std::int64_t heads = got.dv.dim(1), d = got.dv.dim(2);
  const auto no_key = [&](std::int64_t token, std::int64_t head) {
    return trained.results.lse.get(head, token) == -std::numeric_limits<float>::infinity();
  };
  const auto no_row = [&](std::int64_t token, std::int64_t head) {  // its weights are all 0
    return is_zero(&expected.dv[(token * heads + head) * d], d);
  };
  if (const auto dq = zeros("dq", got.dq, no_key); !dq) return dq;
  if (const auto dk = zeros("dk", got.dk, no_row); !dk) return dk;
  return zeros("dv", got.dv, no_row);
}

}  // namespace

Given::Given(Case given) : c(std::move(given)), data(c), dout(noise_dout(c)) {}

Trained train(CudaRunner& run, const Given& given) {
  Chosen chosen(run.plan(), {.gap = 1});
  chosen.offsets.as<std::int64_t>(0) = 0;  // poison would be the mark of offsets that are out of date
  Attention results = run.forward(given.data.inputs(), chosen, given.c.outputs);
  Slopes slopes = run.backward(given.data.inputs(), chosen, results, given.dout, given.c.outputs);
  return {std::move(chosen), std::move(results), std::move(slopes)};
}

Trained train_dense(CudaRunner& run, const Given& given) {
  Attention results = run.dense(given.data.inputs(), given.c.outputs);
  Slopes slopes = run.dense_backward(given.data.inputs(), results, given.dout, given.c.outputs);
  return {std::nullopt, std::move(results), std::move(slopes)};
}

Trained train_on(CudaRunner& run, const Given& given, const Chosen& chosen) {
  Chosen own = chosen;
  Attention results = run.attend(given.data.inputs(), own, given.c.outputs);
  Slopes slopes = run.backward(given.data.inputs(), own, results, given.dout, given.c.outputs);
  return {std::move(own), std::move(results), std::move(slopes)};
}

std::size_t training_limit(const Problem& problem, const std::string& family, int hundredths) {
  // What forward can do with may be too little for backward, which then says what it needs.
  const Plan smallest(problem, cuda_options(family, least_workspace(problem, family)));
  const std::size_t least = std::max(smallest.workspace_bytes(), smallest.backward_workspace_bytes());
  const std::size_t most = std::max(least, most_workspace(problem, family));
  return least + (most - least) / 100 * static_cast<std::size_t>(hundredths);
}

bool has_slabs_and_passes(const Plan& plan) {
  const cuda::Setup& setup = *plan.impl().cuda;
  const cuda::BackwardSetup &chosen = setup.chosen_backward, &dense = setup.dense_backward;
  return chosen.sums_keys(setup.shape) && chosen.parts < chosen.all_parts && dense.parts < dense.all_parts;
}

reference::GradientRows f64_gradients(const Given& given, const Trained& trained) {
  Runner run(given.c.problem(), reference_options());
  Inputs inputs = given.data.inputs();
  std::pair<Array, Array> rotated;
  if (given.c.rope) {
    rotated = run.rope(inputs);
    inputs.q = std::as_const(rotated.first).tensor();
    inputs.k = std::as_const(rotated.second).tensor();
  }
  if (!trained.chosen) return backward_f64(run, inputs, nullptr, given.dout, &trained.results);
  Chosen chosen = *trained.chosen;
  run.index(inputs, chosen);
  return backward_f64(run, inputs, &chosen, given.dout, &trained.results);
}

reference::GradientRows cpu_gradients(const Given& given, const Trained& trained) {
  CpuJudge judge(given.c, given.data, trained.chosen ? &*trained.chosen : nullptr);
  const Slopes slopes = judge.gradients(given.dout, &trained.results);
  return {slopes.dq.numbers(), slopes.dk.numbers(), slopes.dv.numbers()};
}

::testing::AssertionResult near(const Given& given, const Trained& trained, const reference::GradientRows& expected,
                                double extra) {
  // Sums of products in the matrix units are a little further from float64 than float32 is.
  constexpr double kMatrixUnits = 1e-6;
  const Slopes& got = trained.slopes;
  if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << "wrote beyond the gradients";
  if (extra == 0) note(given.c.dtype, tensor_errors(got, expected));
  if (const auto result = zeros(trained, expected); !result) return result;
  return close(got, expected, given.data, given.dout, scale_of(given.c), gradient_bound(given.c.dtype),
               extra + kMatrixUnits);
}

TensorErrors tensor_errors(const Slopes& got, const reference::GradientRows& expected) {
  return {relative_error(got.dq, expected.dq), relative_error(got.dk, expected.dk),
          relative_error(got.dv, expected.dv)};
}

}  // namespace moba::test
