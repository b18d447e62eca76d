#include "cpu_figures.h"

#include <cstdio>
#include <cstring>
#include <optional>

#include "blas.h"
#include "buffer.h"
#include "memory_peak.h"
#include "moba/moba.h"
#include "random_inputs.h"
#include "timing.h"

namespace moba::bench {

namespace {

constexpr int kSgemms = 4;  // products timed at a time

// A causal problem of one sequence, B = 128, k = 8, d = 128.
Problem problem_of(DType dtype, std::int64_t tokens, std::int64_t q_heads, std::int64_t kv_heads) {
  Problem problem;
  problem.dtype = dtype;
  problem.q_heads = q_heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = 128;
  problem.total_q = problem.total_k = tokens;
  problem.config.block_size = 128;
  problem.config.top_k = 8;
  return problem;
}

Options options_of(int threads, Bf16Products products) {
  Options options;
  options.threads = threads;
  options.bf16_products = products;
  return options;
}

// A problem with its memory, and every stage ready to run. Random input without rope: the blocks are chosen evenly.
class Workload {
 public:
  Workload(const Problem& problem, int threads, Bf16Products products = Bf16Products::automatic)
      : plan(problem, options_of(threads, products)),
        random_(problem, {0, problem.total_q}, {0, problem.total_k}, 1),
        inputs_(random_.inputs),
        out_(random_.q.size()),
        lse_(static_cast<std::size_t>(problem.total_q * problem.q_heads) * sizeof(float)),
        centroids_(static_cast<std::size_t>(plan.max_blocks() * problem.kv_heads * problem.head_dim) *
                   size_in_bytes(problem.dtype)),
        selected_(plan.selection_bytes()),
        routed_(plan.selection_bytes()),
        workspace_(plan.workspace_bytes()),
        dout_(random_.q.size()),
        dq_(random_.q.size()),
        dk_(random_.k.size()),
        dv_(random_.v.size()),
        backward_workspace_(plan.backward_workspace_bytes()),
        selection_(make_selection(plan, selected_.span())),
        routing_(make_selection(plan, routed_.span())) {
    outputs_.out = Tensor(out_.data(), problem.dtype, {problem.total_q, problem.q_heads, problem.head_dim});
    outputs_.lse = Tensor(lse_.data(), DType::f32, {problem.q_heads, problem.total_q});
    representatives_ =
        Tensor(centroids_.data(), problem.dtype, {plan.max_blocks(), problem.kv_heads, problem.head_dim});
    results_ = {outputs_.out, outputs_.lse};
    const auto like = [](const ConstTensor& tensor, const cli::Buffer& memory) {
      return Tensor(memory.data(), tensor.dtype, {tensor.shape[0], tensor.shape[1], tensor.shape[2]});
    };
    std::memcpy(dout_.data(), random_.q.data(), dout_.size());  // noise as any other
    dout_view_ = like(inputs_.q, dout_);
    gradients_ = {like(inputs_.q, dq_), like(inputs_.k, dk_), like(inputs_.v, dv_)};
    // So that each stage can be timed on its own, in any order.
    select();
    pool();
    gate();
    attend();
  }

  void pool() { moba::pool(plan, inputs_, representatives_, workspace_.span()); }
  void gate() { moba::gate(plan, inputs_, representatives_, routing_, workspace_.span()); }
  void index() { moba::index(plan, inputs_, routing_, workspace_.span()); }
  void attend() { moba::attend(plan, inputs_, selection_, outputs_, workspace_.span()); }
  void forward() { forward(workspace_.span()); }
  void forward(Workspace workspace) { moba::forward(plan, inputs_, outputs_, workspace); }
  void dense() { moba::dense(plan, inputs_, outputs_, workspace_.span()); }
  void backward() {
    moba::backward(plan, inputs_, selection_, results_, dout_view_, gradients_, backward_workspace_.span());
  }

  const Plan plan;

 private:
  void select() { moba::select(plan, inputs_, selection_, workspace_.span()); }

  cli::RandomInputs random_;
  Inputs inputs_;
  cli::Buffer out_, lse_, centroids_, selected_, routed_, workspace_, dout_, dq_, dk_, dv_, backward_workspace_;
  Selection selection_;  // what attend reads
  Selection routing_;    // what gate and index write
  Outputs outputs_;
  ConstOutputs results_;
  ConstTensor dout_view_;
  Gradients gradients_;
  Tensor representatives_;
};

void figure(const char* name, double value, const char* unit) {
  std::printf("figure cpu.%s %.4g %s\n", name, value, unit);
  std::fflush(stdout);
}

}  // namespace

void cpu_figures(int threads, int repetitions) {
  Workload gqa(problem_of(DType::f32, 16384, 8, 2), threads), gqa_bf16(problem_of(DType::bf16, 16384, 8, 2), threads);
  // The way of multiplying bfloat16 that the plan does not choose here, for comparison.
  std::optional<Workload> other_bf16;
  if (bf16_support().available) {
    other_bf16.emplace(problem_of(DType::bf16, 16384, 8, 2), threads,
                       bf16_support().preferred ? Bf16Products::widen : Bf16Products::dot);
  }
  Workload head(problem_of(DType::f32, 32768, 1, 1), threads);
  Sgemm sgemm(gqa.plan.threads());
  std::fprintf(stderr, "%s; bfloat16: %s; OpenBLAS kernels %s\n", gqa.plan.kernels().c_str(),
               gqa_bf16.plan.kernels().c_str(), blas_kernels().c_str());

  gqa.forward();  // so that the pages of the outputs are there, and not counted
  const double extra = peak_extra_bytes([&] {
    const cli::Buffer workspace(gqa.plan.workspace_bytes());
    gqa.forward(workspace.span());
  });

  Timed things;
  things["sgemm"] = [&] {
    for (int i = 0; i < kSgemms; ++i) sgemm.run();
  };
  things["pool"] = [&] { gqa.pool(); };
  things["gate"] = [&] { gqa.gate(); };
  things["index"] = [&] { gqa.index(); };
  things["attend"] = [&] { gqa.attend(); };
  things["attend_bf16"] = [&] { gqa_bf16.attend(); };
  if (other_bf16) things["attend_bf16_other"] = [&] { other_bf16->attend(); };
  things["backward"] = [&] { gqa.backward(); };
  things["moba_32k"] = [&] { head.forward(); };
  things["dense_32k"] = [&] { head.dense(); };
  const auto seconds = best_seconds(things, repetitions);

  const Arithmetic work = gqa.plan.arithmetic(), one = head.plan.arithmetic();
  const auto rate = [&](double flops, const char* name) { return flops / seconds.at(name) / 1e9; };
  const double blas = rate(kSgemms * Sgemm::kFlops, "sgemm");
  const double routing = seconds.at("pool") + seconds.at("gate") + seconds.at("index");
  figure("sgemm", blas, "GFLOP/s");
  figure("attend", rate(work.attend, "attend"), "GFLOP/s");
  figure("attend_over_sgemm", rate(work.attend, "attend") / blas, "ratio");
  figure("attend_bf16", rate(work.attend, "attend_bf16"), "GFLOP/s");
  figure("attend_bf16_over_sgemm", rate(work.attend, "attend_bf16") / blas, "ratio");
  if (other_bf16) {
    figure(bf16_support().preferred ? "attend_bf16_widen" : "attend_bf16_dot", rate(work.attend, "attend_bf16_other"),
           "GFLOP/s");
  }
  figure("backward", rate(work.backward, "backward"), "GFLOP/s");
  figure("backward_over_sgemm", rate(work.backward, "backward") / blas, "ratio");
  figure("pool", seconds.at("pool") * 1e3, "ms");
  figure("gate", seconds.at("gate") * 1e3, "ms");
  figure("index", seconds.at("index") * 1e3, "ms");
  figure("routing_share", routing / (routing + seconds.at("attend")), "ratio");
  figure("dense", rate(one.dense, "dense_32k"), "GFLOP/s");
  figure("dense_over_sgemm", rate(one.dense, "dense_32k") / blas, "ratio");
  figure("moba_32k", seconds.at("moba_32k") * 1e3, "ms");
  figure("moba_over_dense", seconds.at("dense_32k") / seconds.at("moba_32k"), "ratio");
  figure("flop_ratio", one.dense / (one.pool + one.gate + one.attend), "ratio");
  figure("plan_extra_mib", static_cast<double>(gqa.plan.workspace_bytes()) / (1 << 20), "MiB");
  if (extra >= 0) figure("peak_extra_mib", extra / (1 << 20), "MiB");
}

}  // namespace moba::bench
