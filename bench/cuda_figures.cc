#include "cuda_figures.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "cuda_roofline.h"
#include "cuda_workload.h"

namespace moba::bench {

namespace {

void figure(const std::string& name, double value, const char* unit) {
  std::printf("figure cuda.%s %.4g %s\n", name.c_str(), value, unit);
  std::fflush(stdout);
}

class Figures {
 public:
  Figures(const CudaDevice& device, bool with_steady, cudaStream_t stream)
      : roofline_(roofline_of(device.name)), with_steady_(with_steady), stream_(stream) {}

  // The yardstick of everything that is bound by memory.
  void copy() const {
    constexpr std::size_t kBytes = std::size_t{2} << 30;
    const CudaBuffer from(kBytes), to(kBytes);
    MOBA_CUDA(cudaMemsetAsync(from.data(), 1, kBytes, stream_));
    const auto times = rested(stream_, [&](Marks& marks) {
      MOBA_CUDA(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream_));
      marks.mark("copy");
    });
    figure("copy", 2.0 * kBytes / times.front().ms / 1e6, "GB/s");
  }

  void all_of(const CudaProblem& problem) {
    CudaWorkload workload(problem, stream_);
    const std::string& name = problem.name;
    std::fprintf(stderr, "\n%s: %s\n%-17s %10s %10s %10s %10s\n", name.c_str(), workload.plan.kernels().c_str(),
                 "stage", "ms", "TFLOP/s", "GB/s", "roofline");
    const auto work = amounts(workload.plan, problem.starts);
    const auto time = [&](const Work& call, const std::string& of = "") {
      std::vector<StageTime> times = rested(stream_, call);
      for (StageTime& stage : times) {
        stage.name = of + stage.name;
        print(name, stage, work);
      }
      return times;
    };

    if (problem.stages) time([&](Marks& marks) { workload.staged(marks); });
    const Digest staged = problem.stages ? workload.result() : Digest{};
    if (problem.stages) figure(name + ".longest_list", workload.longest_list(), "ratio");
    if (problem.problem.rope) time([&](Marks& marks) { workload.rope(marks); });
    const Work forward = [&](Marks& marks) { workload.forward(marks); };
    const double ms = time(forward).front().ms;
    if (with_steady_) figure(name + ".forward_steady", steady(stream_, forward), "ms");
    if (const Digest whole = workload.result(); problem.stages && whole != staged) {
      throw std::runtime_error(name + ": forward and its stages one by one give different bits");
    }
    if (problem.dense) {
      const double dense_ms = time([&](Marks& marks) { workload.dense(marks); }).front().ms;
      workload.result();
      figure(name + ".dense_over_forward", dense_ms / ms, "ratio");
    }
    training(workload, problem, time);
    figure(name + ".workspace", static_cast<double>(workload.plan.workspace_bytes()) / (1 << 20), "MiB");
    forward_ms_[name] = ms;
    if (const auto other = forward_ms_.find(problem.ratio_to); other != forward_ms_.end()) {
      figure(name + ".over_" + problem.ratio_to, ms / other->second, "ratio");
    }
  }

 private:
  // The figures of backward, and of forward and backward together. `time` as in all_of.
  template <class Time>
  void training(CudaWorkload& workload, const CudaProblem& problem, const Time& time) {
    const std::string& name = problem.name;
    const Work both = [&](Marks& marks) { workload.training(marks); };
    const Work backward = [&](Marks& marks) { workload.backward(marks); };
    time(both);  // first: the others read the selection
    const Digest whole = workload.gradients();
    const double ms = time(backward).front().ms;
    if (with_steady_) {
      figure(name + ".training_steady", steady(stream_, both), "ms");
      figure(name + ".backward_steady", steady(stream_, backward), "ms");
    }
    if (problem.stages) {
      time([&](Marks& marks) { workload.staged_backward(marks); }, "backward_");
      if (workload.gradients() != whole) {
        throw std::runtime_error(name + ": backward and its stages one by one give different bits");
      }
    }
    if (problem.dense) {
      Marks before(stream_);
      workload.dense(before);
      time([&](Marks& marks) { workload.dense_backward(marks); });
      workload.gradients();
    }
    figure(name + ".training_memory", static_cast<double>(workload.training_bytes()) / (1 << 20), "MiB");
    backward_ms_[name] = ms;
    if (const auto other = backward_ms_.find(problem.ratio_to); other != backward_ms_.end()) {
      figure(name + ".backward_over_" + problem.ratio_to, ms / other->second, "ratio");
    }
  }

  void print(const std::string& problem, const StageTime& stage, const std::map<std::string, Amount>& work) const {
    const std::string name = problem + "." + stage.name;
    figure(name, stage.ms, "ms");
    std::fprintf(stderr, "%-17s %10.4f", stage.name.c_str(), stage.ms);
    const auto known = work.find(stage.name);
    if (known == work.end()) return static_cast<void>(std::fprintf(stderr, "\n"));
    const Amount& amount = known->second;
    const double seconds = stage.ms / 1e3, tflops = amount.flop / seconds / 1e12, gbs = amount.byte / seconds / 1e9;
    if (amount.flop > 0) figure(name + "_rate", tflops, "TFLOP/s");
    figure(name + "_memory", gbs, "GB/s");
    std::fprintf(stderr, " %10.1f %10.0f", tflops, gbs);
    if (roofline_) {
      const double share = least_seconds(stage.name, work) / seconds;
      figure(name + "_roofline", share, "ratio");
      std::fprintf(stderr, " %10.3f", share);
    }
    std::fprintf(stderr, "\n");
  }

  // The stages follow each other: what bounds one does not overlap with what bounds the next.
  double least_seconds(const std::string& call, const std::map<std::string, Amount>& work) const {
    double seconds = 0;
    for (const std::string& stage : stages_of(call)) {
      seconds += roofline_->seconds(work.at(stage).flop, work.at(stage).byte);
    }
    return seconds;
  }

  std::optional<Roofline> roofline_;
  bool with_steady_;
  cudaStream_t stream_;
  std::map<std::string, double> forward_ms_, backward_ms_;
};

std::vector<CudaProblem> chosen(const CudaFigureOptions& options) {
  std::vector<CudaProblem> result;
  for (CudaProblem& problem : cuda_problems()) {
    const bool named = std::find(options.names.begin(), options.names.end(), problem.name) != options.names.end();
    if (options.names.empty() ? options.quick && !problem.target : !named) continue;
    if (!options.kernels.empty() && problem.options.cuda_kernels != options.kernels) {
      problem.options.cuda_kernels = options.kernels;
      problem.name += "_" + options.kernels;
    }
    result.push_back(std::move(problem));
  }
  return result;
}

}  // namespace

std::vector<std::string> cuda_problem_names() {
  std::vector<std::string> names;
  for (const CudaProblem& problem : cuda_problems()) names.push_back(problem.name);
  return names;
}

void cuda_figures(const CudaDevice& device, const CudaFigureOptions& options) {
  MOBA_CUDA(cudaSetDevice(device.index));
  cudaStream_t stream = nullptr;
  MOBA_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Figures figures(device, !options.quick, stream);
  figures.copy();
  for (CudaProblem& problem : chosen(options)) {
    problem.options.cuda_device = device.index;
    figures.all_of(problem);
  }
  MOBA_CUDA(cudaStreamDestroy(stream));
}

}  // namespace moba::bench
