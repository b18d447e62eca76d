// Times on the device, between events of one stream.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace moba::bench {

struct StageTime {
  std::string name;
  double ms = 0;
};

// The events of one call.
class Marks {
 public:
  explicit Marks(cudaStream_t stream) : stream_(stream) { record(""); }

  // What the stream was given since the mark before belongs to `stage`. A stage may come more than once.
  void mark(const char* stage) { record(stage); }

  // The sum for each stage, in the order in which they first came. The stream must have passed the last mark.
  std::vector<StageTime> times() const;
  double total_ms() const;

 private:
  struct Destroy {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  };
  using Event = std::unique_ptr<CUevent_st, Destroy>;

  void record(const char* stage);

  cudaStream_t stream_;
  std::vector<std::pair<const char*, Event>> events_;
};

// One call: gives its work to the stream that the marks are of, and marks it.
using Work = std::function<void(Marks&)>;

// Medians of 5 calls (3 of calls that take more than 0.2 s) in a row, behind 2 that do not count, after 0.6 seconds
// of rest: what a model sees that has other things to do as well.
std::vector<StageTime> rested(cudaStream_t stream, const Work& work);

// Milliseconds of a call after a second of nothing else: the power limit has lowered the clock by then.
double steady(cudaStream_t stream, const Work& work);

}  // namespace moba::bench
