// Training: forward keeps the blocks it chose, backward takes them and gives the gradients. Here q, k and v themselves
// are what is learned, by gradient descent towards the outputs of other queries, keys and values.
#include <moba/moba.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

namespace {

constexpr std::int64_t kTokens = 512, kQueryHeads = 4, kKeyHeads = 2, kHeadDim = 32;
constexpr std::int64_t kQueries = kTokens * kQueryHeads * kHeadDim, kKeys = kTokens * kKeyHeads * kHeadDim;
constexpr int kSteps = 60;
constexpr float kStepSize = 0.1f;

using Values = std::vector<float>;

Values made_up(std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  Values values(static_cast<std::size_t>(size));
  for (float& value : values) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  return values;
}

moba::Tensor of_queries(Values& values) { return {values.data(), moba::DType::f32, {kTokens, kQueryHeads, kHeadDim}}; }
moba::Tensor of_keys(Values& values) { return {values.data(), moba::DType::f32, {kTokens, kKeyHeads, kHeadDim}}; }

// q, k and v of one attention layer, or their gradients.
struct Layer {
  explicit Layer(unsigned seed)
      : q(made_up(kQueries, seed)), k(made_up(kKeys, seed + 1)), v(made_up(kKeys, seed + 2)) {}
  Values q, k, v;

  moba::Inputs inputs() {
    moba::Inputs in;
    in.q = of_queries(q), in.k = of_keys(k), in.v = of_keys(v);
    return in;
  }
};

void descend(Values& values, const Values& gradient) {
  for (std::size_t i = 0; i < values.size(); ++i) values[i] -= kStepSize * gradient[i];
}

int run() {
  moba::Problem problem;
  problem.q_heads = kQueryHeads, problem.kv_heads = kKeyHeads, problem.head_dim = kHeadDim;
  problem.total_q = problem.total_k = kTokens;
  problem.config.block_size = 64, problem.config.top_k = 3;
  problem.rope = moba::Rope{};
  const moba::Plan plan(problem);

  // What a step needs beside q, k and v: out and lse, the selection, dout, and one workspace for both directions.
  Values out(kQueries), lse(kQueryHeads * kTokens), dout(kQueries);
  moba::Outputs outputs;
  outputs.out = of_queries(out);
  outputs.lse = {lse.data(), moba::DType::f32, {kQueryHeads, kTokens}};
  std::vector<std::byte> chosen(plan.selection_bytes());
  const moba::Selection selection = moba::make_selection(plan, chosen);
  std::vector<std::byte> workspace(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()));

  Layer teacher(1), learner(11), gradient(21);
  moba::forward(plan, teacher.inputs(), outputs, workspace);
  const Values target = out;

  double first = 0, last = 0;
  for (int step = 0; step < kSteps; ++step) {
    moba::forward(plan, learner.inputs(), selection, outputs, workspace);
    // The loss is half the sum of (out - target)^2, so dout is out - target.
    last = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      dout[i] = out[i] - target[i];
      last += 0.5 * static_cast<double>(dout[i]) * static_cast<double>(dout[i]);
    }
    if (step == 0) first = last;
    if (step % 10 == 0) std::printf("step %d: loss %.1f\n", step, last);
    moba::backward(plan, learner.inputs(), selection, {outputs.out, outputs.lse}, of_queries(dout),
                   {of_queries(gradient.q), of_keys(gradient.k), of_keys(gradient.v)}, workspace);
    descend(learner.q, gradient.q);
    descend(learner.k, gradient.k);
    descend(learner.v, gradient.v);
  }
  std::printf("loss %.1f became %.1f\n", first, last);
  return last < first / 4 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "training: %s\n", error.what());
    return 1;
  }
}
