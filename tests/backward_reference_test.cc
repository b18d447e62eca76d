// backward: the reference against central differences of float64 forward; and what a rope adds, on every backend.
#include <algorithm>
#include <cmath>
#include <functional>

#include "support.h"

namespace moba::test {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// sum(dout * out) of float64 forward, over the given choice or all keys, after the rope of the plan if it has one.
double loss(Runner& run, const Inputs& given, Chosen* chosen, const std::vector<double>& dout) {
  Inputs inputs = given;
  std::pair<Array, Array> rotated;
  if (run.plan().problem().rope) {
    rotated = run.rope(given);
    inputs.q = rotated.first.tensor();
    inputs.k = rotated.second.tensor();
  }
  const reference::Rows rows = chosen ? attend_f64(run, inputs, *chosen) : dense_f64(run, inputs);
  double sum = 0;
  for (std::size_t i = 0; i < dout.size(); ++i) sum += dout[i] * rows.out[i];
  return sum;
}

// The derivative by every element of x, by differences of fourth order. x holds multiples of `step`, small enough that
// sums with it are exact.
std::vector<double> differences(Array& x, double step, const std::function<double()>& f) {
  std::vector<double> slopes;
  for (std::int64_t i = 0; i < x.dim(0); ++i) {
    for (std::int64_t j = 0; j < x.dim(1); ++j) {
      for (std::int64_t l = 0; l < x.dim(2); ++l) {
        const float at = x.get(i, j, l);
        const auto moved = [&](double steps) {
          x.set(i, j, l, static_cast<float>(at + steps * step));
          return f();
        };
        slopes.push_back((8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step));
        x.set(i, j, l, at);
      }
    }
  }
  return slopes;
}

void round_to(Array& x, double step) {
  for (std::int64_t i = 0; i < x.dim(0); ++i) {
    for (std::int64_t j = 0; j < x.dim(1); ++j) {
      for (std::int64_t l = 0; l < x.dim(2); ++l) {
        x.set(i, j, l, static_cast<float>(std::round(x.get(i, j, l) / step) * step));
      }
    }
  }
}

void expect_near(const std::vector<double>& got, const std::vector<double>& expected, double bound, const char* name) {
  ASSERT_EQ(got.size(), expected.size());
  double most = 1;
  for (const double slope : expected) most = std::max(most, std::abs(slope));
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], bound * most) << name << " " << i;
}

std::vector<Case> small_cases() {
  std::vector<Case> all;
  for (const bool causal : {true, false}) {
    const Config config{.block_size = 4, .top_k = 2, .causal = causal};
    all.push_back({.name = "one sequence",
                   .q_heads = 4,
                   .kv_heads = 2,
                   .head_dim = 8,
                   .q_lengths = {17},
                   .k_lengths = {17},
                   .config = config});
    all.push_back({.name = "lengths",
                   .head_dim = 9,
                   .q_lengths = {5, 9, 0, 3, 1, 4},
                   .k_lengths = {11, 3, 5, 0, 1, 12},
                   .config = config});
    all.push_back({.name = "scale",
                   .head_dim = 8,
                   .q_lengths = {12},
                   .k_lengths = {15},
                   .config = {.block_size = 3, .top_k = 3, .causal = causal, .scale = -0.7}});
  }
  return all;
}

class SmallBackward : public ::testing::TestWithParam<Case> {};

TEST_P(SmallBackward, ReferenceIsTheSlopeOfForward) {
  const Case& c = GetParam();
  Data data(c);
  for (Array* x : {&data.q, &data.k, &data.v}) round_to(*x, 0x1p-7);
  const Array dout = noise_dout(c);
  Runner run(c.problem(), reference_options());
  Chosen gated = run.select(data.inputs()), any(run.plan()), shared(run.plan(), {}, true);
  for (Chosen* chosen : {&any, &shared}) {
    choose_anything(c, *chosen, c.seed);
    run.index(data.inputs(), *chosen);
  }
  for (Chosen* chosen : {&gated, &any, &shared, static_cast<Chosen*>(nullptr)}) {
    const reference::GradientRows got = backward_f64(run, data.inputs(), chosen, dout);
    const auto by = [&](Array& x) {
      return differences(x, 0x1p-7, [&] { return loss(run, data.inputs(), chosen, dout.numbers()); });
    };
    expect_near(got.dq, by(data.q), 1e-7, "dq");
    expect_near(got.dk, by(data.k), 1e-7, "dk");
    expect_near(got.dv, by(data.v), 1e-7, "dv");
  }
}

INSTANTIATE_TEST_SUITE_P(Backward, SmallBackward, ::testing::ValuesIn(small_cases()), case_name);

std::vector<Rope> ropes() {
  Rope partial, interleaved, yarn;
  partial.rotary_dim = 4;
  interleaved.style = RopeStyle::interleaved;
  interleaved.base = 100;
  yarn.scaling = RopeScaling::yarn;
  yarn.factor = 4;
  yarn.original_max_position = 16;
  return {Rope{}, partial, interleaved, yarn};
}

// With a rope in the plan the gradients are those of the unrotated q and k. (The rotated ones are rounded to float32,
// which is noise to the differences; so the steps are longer and the bound is wider.)
TEST(BackwardRope, ReferenceIsTheSlopeOfForward) {
  for (const Rope& rope : ropes()) {
    Case c{
        .head_dim = 8, .q_lengths = {6, 4}, .k_lengths = {9, 4}, .config = {.block_size = 3, .top_k = 2}, .rope = rope};
    Data data(c);
    for (Array* x : {&data.q, &data.k, &data.v}) round_to(*x, 0x1p-4);
    const Array dout = noise_dout(c);
    Runner run(c.problem(), reference_options());
    Chosen chosen(run.plan());
    Attention results = run.forward(data.inputs(), chosen);
    const Slopes got = run.backward(data.inputs(), chosen, results, dout);
    const auto by = [&](Array& x) {
      return differences(x, 0x1p-4, [&] { return loss(run, data.inputs(), &chosen, dout.numbers()); });
    };
    expect_near(got.dq.numbers(), by(data.q), 2e-5, "dq");
    expect_near(got.dk.numbers(), by(data.k), 2e-5, "dk");
    expect_near(got.dv.numbers(), by(data.v), 2e-5, "dv");
  }
}

// The cpu turns its gradients back as the reference does; and turning them is all that a rope adds.
TEST(BackwardRope, CpuIsCloseToTheReference) {
  for (const DType dtype : kTypes) {
    for (const Rope& rope : ropes()) {
      Case c{.dtype = dtype,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = 24,
             .q_lengths = {150, 0, 31},
             .k_lengths = {170, 3, 31},
             .config = {.block_size = 16, .top_k = 3},
             .outputs = {.gap = 3}};
      c.rope = rope;
      if (rope.rotary_dim == 0 && rope.style == RopeStyle::half_split) c.rope->rotary_dim = 14;
      const Data data(c);
      const Array dout = noise_dout(c);
      for (const Options& options : cpu_kernels(dtype)) {
        SCOPED_TRACE(describe(options));
        Runner run(c.problem(), options);
        Chosen chosen(run.plan());
        Attention results = run.forward(data.inputs(), chosen);
        const auto rotated = run.rope(data.inputs());
        Inputs turned = data.inputs();
        turned.q = rotated.first.tensor();
        turned.k = rotated.second.tensor();
        const double bound = gradient_bound(dtype), scale = scale_of(c);
        EXPECT_TRUE(close(run.backward(data.inputs(), chosen, results, dout, c.outputs),
                          backward_f64(run, turned, &chosen, dout), data, dout, scale, bound));
        Attention all = run.dense(data.inputs());
        EXPECT_TRUE(close(run.dense_backward(data.inputs(), all, dout, c.outputs),
                          backward_f64(run, turned, nullptr, dout), data, dout, scale, bound));
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
