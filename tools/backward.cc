// moba backward: gradients of tensors in a file, timed and held against float64.
#include <cmath>
#include <cstdio>
#include <optional>

#include "attention_file.h"
#include "commands.h"
#include "describe.h"
#include "gradient_accuracy.h"
#include "memory_use.h"
#include "moba/error.h"
#include "output_file.h"
#include "random_inputs.h"
#include "safetensors.h"
#include "stages.h"
#include "text.h"
#include "training.h"

namespace moba::cli {
namespace {

constexpr std::uint64_t kSeed = 1;

// The gradient of out that is carried back: the file's, or made up.
struct UpstreamGradient {
  UpstreamGradient(const BackwardArguments& arguments, const AttentionFile& file) {
    tensor = read_dout(arguments.input, memory);
    if (!tensor.given()) {
      seed = arguments.seed.value_or(kSeed);
      const ConstTensor& q = file.inputs.q;
      tensor = random_tensor(memory, q.dtype, q.shape[0], q.shape[1], q.shape[2], *seed);
    } else if (arguments.seed) {
      throw Error("--seed: is " + std::to_string(*arguments.seed) + "; allowed only where the file holds no dout");
    }
  }

  Buffer memory;
  ConstTensor tensor;
  std::optional<std::uint64_t> seed;  // where it was made up
};

// What they wrote, where the host can read it, as long as they are there.
struct Computed {
  explicit Computed(const Training& training)
      : ids(training.selection().ids),
        out(training.results().out),
        lse(training.results().lse),
        dq(training.gradients().dq),
        dk(training.gradients().dk),
        dv(training.gradients().dv) {}

  Outputs results() const { return {out.tensor(), lse.tensor()}; }
  Gradients gradients() const { return {dq.tensor(), dk.tensor(), dv.tensor()}; }

  OnHost ids, out, lse, dq, dk, dv;
};

bool to_be_checked(const BackwardArguments& arguments, double flop) {
  if (arguments.check != CheckGradients::automatic) return arguments.check == CheckGradients::always;
  return !arguments.quiet && flop <= kCheckedFlop;
}

void write_output(const BackwardArguments& arguments, const Plan& plan, const Computed& computed,
                  const UpstreamGradient& dout) {
  if (arguments.output.empty()) return;
  std::vector<NamedTensor> tensors{{"dq", computed.dq.tensor()},
                                   {"dk", computed.dk.tensor()},
                                   {"dv", computed.dv.tensor()},
                                   {"out", computed.out.tensor()},
                                   {"lse", computed.lse.tensor()}};
  std::map<std::string, std::string> metadata = describe_output(plan.problem(), true);
  if (dout.seed) {
    tensors.push_back({"dout", dout.tensor});
    metadata["seed"] = std::to_string(*dout.seed);
  }
  write_safetensors(arguments.output, tensors, metadata);
  if (!arguments.quiet) std::printf("\n%s: %s\n", arguments.output.c_str(), list(tensors).c_str());
}

void print_problem(const BackwardArguments& arguments, const AttentionFile& file, const Plan& plan,
                   const UpstreamGradient& dout) {
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n", describe_attention(plan.problem(), true).c_str(), plan.kernels().c_str());
  std::printf("dout: %s\n\n", dout.seed ? ("random, seed " + std::to_string(*dout.seed)).c_str() : "the file's");
  std::fflush(stdout);  // what follows can take a while
}

// A line a gradient: its norm and, where they are given, its errors.
void print_gradients(const Gradients& gradients, const std::optional<GradientErrors>& errors, double flop) {
  std::printf("\n%-8s %12s%s\n", "gradient", "norm", errors ? "    max error       median" : "");
  const auto line = [&](const char* name, const Tensor& x, const RowErrors GradientErrors::*of) {
    std::printf("%-8s %12.4e%s%s\n", name, std::abs(norm(x)), errors ? " " : "",
                errors ? columns((*errors).*of).c_str() : "");
  };
  line("dq", gradients.dq, &GradientErrors::dq);
  line("dk", gradients.dk, &GradientErrors::dk);
  line("dv", gradients.dv, &GradientErrors::dv);
  std::printf("%s\n", errors ? "error: against float64 gradients of the same blocks, out and lse, relative per row"
                             : ("not held against float64: " + format_flop(flop) + " (--check always)").c_str());
}

void print_times(const AttentionFile& file, const Plan& plan, std::vector<StageTime> times) {
  const MemoryUse use = memory_use(plan);
  count_flop(times, plan.arithmetic(file.starts_q, file.starts_k));
  print_stage_table(times, RateUnit(plan));
  std::printf("\nmemory: workspace %s forward, %s backward", format_bytes(use.workspace).c_str(),
              format_bytes(use.backward_workspace).c_str());
  if (!plan.forward_is_dense()) std::printf("; selection %s", format_bytes(use.kept_selection).c_str());
  std::printf("\n");
}

}  // namespace

void backward(const BackwardArguments& arguments) {
  if (arguments.quiet && arguments.check == CheckGradients::always) {
    throw Error("--check: is always; allowed with --quiet, which prints no errors: auto, never");
  }
  if (!arguments.output.empty()) check_output(arguments.output, arguments.input);
  const AttentionFile file = read_attention_file(arguments.input);
  const Plan plan(file.problem(arguments.attention), arguments.attention.options);
  const double flop = plan.arithmetic(file.starts_q, file.starts_k).backward;
  const bool checked = to_be_checked(arguments, flop);
  const MemoryUse use = memory_use(plan);
  const double dout_bytes = use.out;
  require_memory(plan, {use.inputs() + dout_bytes, use.trained(), use.results() + use.ids + use.gradients(),
                        checked ? gradient_accuracy_bytes(plan) : 0.0});
  const UpstreamGradient dout(arguments, file);
  if (!arguments.quiet) print_problem(arguments, file, plan, dout);

  const PlacedInputs inputs(plan, file.inputs);
  const PlacedTensor placed_dout(Place(plan), dout.tensor, "dout");
  Training training(plan, inputs.inputs(), placed_dout.tensor());
  std::vector<StageTime> times;
  {
    Progress progress(!arguments.quiet);
    times = fastest_pass(warm_ups(plan) + arguments.repeat, [&] { return training.run(progress); });
  }
  if (!arguments.quiet) print_times(file, plan, times);
  const Computed computed(training);
  write_output(arguments, plan, computed, dout);
  std::fflush(stdout);
  std::optional<GradientErrors> errors;
  if (checked) {
    Progress progress(!arguments.quiet);
    errors = check_gradients(plan, file.inputs, computed.ids.tensor(), computed.results(), dout.tensor,
                             computed.gradients(), progress);
  }
  if (!arguments.quiet) print_gradients(computed.gradients(), errors, flop);
}

}  // namespace moba::cli
