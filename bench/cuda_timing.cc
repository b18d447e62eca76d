#include "cuda_timing.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "cuda/launch.h"

namespace moba::bench {

namespace {

constexpr auto kRest = std::chrono::milliseconds(600);
constexpr auto kHeadStart = std::chrono::milliseconds(2);
constexpr double kLoadMs = 1000;  // before steady() counts
constexpr double kBatchMs = 50;   // calls in flight together: the stream never waits for the host
constexpr double kLongCallMs = 200;
constexpr int kWarmUps = 2, kCalls = 5, kLongCalls = 3;

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::vector<Marks> run(cudaStream_t stream, const Work& work, int calls) {
  std::vector<Marks> all;
  for (int i = 0; i < calls; ++i) work(all.emplace_back(stream));
  MOBA_CUDA(cudaStreamSynchronize(stream));
  return all;
}

// Lets the host get ahead: short calls would else be measured at the rate at which the host gives them to the stream.
void give_head_start(cudaStream_t stream) {
  MOBA_CUDA(cudaLaunchHostFunc(
      stream, [](void*) { std::this_thread::sleep_for(kHeadStart); }, nullptr));
}

// The first call loads kernels; how long the next takes says how often to call.
double one_call_ms(cudaStream_t stream, const Work& work) { return run(stream, work, 2).back().total_ms(); }

}  // namespace

void Marks::record(const char* stage) {
  cudaEvent_t event = nullptr;
  MOBA_CUDA(cudaEventCreate(&event));
  events_.emplace_back(stage, event);
  MOBA_CUDA(cudaEventRecord(event, stream_));
}

std::vector<StageTime> Marks::times() const {
  std::vector<StageTime> sums;
  for (std::size_t i = 1; i < events_.size(); ++i) {
    const std::string name = events_[i].first;
    float ms = 0;
    MOBA_CUDA(cudaEventElapsedTime(&ms, events_[i - 1].second.get(), events_[i].second.get()));
    auto sum = std::find_if(sums.begin(), sums.end(), [&](const StageTime& stage) { return stage.name == name; });
    if (sum == sums.end()) sum = sums.insert(sums.end(), {name});
    sum->ms += ms;
  }
  return sums;
}

double Marks::total_ms() const {
  float ms = 0;
  MOBA_CUDA(cudaEventElapsedTime(&ms, events_.front().second.get(), events_.back().second.get()));
  return ms;
}

std::vector<StageTime> rested(cudaStream_t stream, const Work& work) {
  const int calls = one_call_ms(stream, work) > kLongCallMs ? kLongCalls : kCalls;
  std::this_thread::sleep_for(kRest);
  give_head_start(stream);
  const std::vector<Marks> all = run(stream, work, kWarmUps + calls);
  std::vector<StageTime> result = all.back().times();
  for (std::size_t stage = 0; stage < result.size(); ++stage) {
    std::vector<double> values;
    for (std::size_t i = kWarmUps; i < all.size(); ++i) values.push_back(all[i].times()[stage].ms);
    result[stage].ms = median(values);
  }
  return result;
}

double steady(cudaStream_t stream, const Work& work) {
  const double ms = std::max(one_call_ms(stream, work), 1e-3);
  const int calls = static_cast<int>(std::clamp(kBatchMs / ms, 1.0, 500.0));
  const auto counted = static_cast<std::size_t>(std::max(calls, kLongCalls));
  std::vector<double> all;
  double loaded = 0;
  while (loaded < kLoadMs || all.size() < counted) {
    for (const Marks& call : run(stream, work, calls)) loaded += all.emplace_back(call.total_ms());
  }
  return median({all.end() - static_cast<std::ptrdiff_t>(counted), all.end()});
}

}  // namespace moba::bench
