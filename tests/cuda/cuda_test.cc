#include "cuda_test.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <thread>

namespace moba::test {

namespace {

const CudaSupport& support() {
  static const CudaSupport found = cuda_support();
  return found;
}

// What the program ends with.
struct Summary {
  std::mutex mutex;
  std::int64_t picks = 0, other_picks = 0, elements = 0, other_elements = 0;
  struct Worst {
    double row = 0, tensor = 0, lse = 0;
  };
  std::map<DType, Worst> worst;
};

Summary& summary() {
  static Summary the_one;
  return the_one;
}

class PrintSummary : public ::testing::Environment {
 public:
  void TearDown() override {
    const Summary& s = summary();
    if (s.picks > 0) {
      std::printf("summary: %lld blocks picked, %lld of them not picked by the reference (float32 rounding)\n",
                  static_cast<long long>(s.picks), static_cast<long long>(s.other_picks));
    }
    if (s.elements > 0) {
      std::printf("summary: %lld elements rotated, %lld of them not the reference's bits\n",
                  static_cast<long long>(s.elements), static_cast<long long>(s.other_elements));
    }
    for (const auto& [dtype, worst] : s.worst) {
      std::printf("summary: %s, worst error of a tensor %.2e, of a row %.2e, of lse %.2e\n", name(dtype), worst.tensor,
                  worst.row, worst.lse);
    }
  }
};
const ::testing::Environment* const kPrintSummary = ::testing::AddGlobalTestEnvironment(new PrintSummary);

double tensor_tolerance(DType dtype) { return dtype == DType::f16 ? 1e-3 : 4e-3; }

// Of finite rows; rows of NaN or of zeros are the business of close().
Summary::Worst errors_of(const Attention& got, const reference::Rows& expected) {
  Summary::Worst worst;
  const std::int64_t tokens = got.out.dim(0), heads = got.out.dim(1), d = got.out.dim(2);
  double all_errors = 0, all_norms = 0;
  for (std::int64_t row = 0; row < tokens * heads; ++row) {
    double error = 0, norm = 0;
    for (std::int64_t x = 0; x < d; ++x) {
      const double should = expected.out[row * d + x], is = got.out.get(row / heads, row % heads, x);
      error += (is - should) * (is - should);
      norm += should * should;
    }
    if (!std::isfinite(error) || norm == 0) continue;
    worst.row = std::max(worst.row, std::sqrt(error / norm));
    all_errors += error;
    all_norms += norm;
    const double lse = expected.lse[row % heads * tokens + row / heads];
    worst.lse =
        std::max(worst.lse, std::abs(got.lse.get(row % heads, row / heads) - lse) / std::max(1.0, std::abs(lse)));
  }
  worst.tensor = all_norms == 0 ? 0 : std::sqrt(all_errors / all_norms);
  return worst;
}

Case in_float32(Case c) {
  c.dtype = DType::f32;
  c.inputs = {};
  c.rope.reset();
  return c;
}

// Copies the elements into a tensor of the same shape.
void widen(Array& to, const Array& from) {
  const std::int64_t inner = from.tensor().rank > 2 ? from.dim(2) : 1;
  for (std::int64_t i = 0; i < from.dim(0); ++i) {
    for (std::int64_t j = 0; j < from.dim(1); ++j) {
      for (std::int64_t x = 0; x < inner; ++x) to.set(i, j, x, from.get(i, j, x));
    }
  }
}

// 16-bit floats as integers that ascend with them, one apart for neighbours.
int ordered(std::uint64_t bits) {
  const int magnitude = static_cast<int>(bits & 0x7fff);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace

void CudaTest::SetUp() {
  if (support().devices.empty()) GTEST_SKIP() << "no GPU for the cuda backend: " << support().problem;
  ASSERT_EQ(cudaSetDevice(device().index), cudaSuccess);
}

const CudaDevice& device() { return support().devices.front(); }

std::vector<std::string> families(const Problem& problem) {
  const bool fits = problem.head_dim == 64 || problem.head_dim == 128;
  if (device().kernels == "sm90" && fits) return {"sm90", "portable"};
  return {"portable"};
}

Options cuda_options(const std::string& family, std::size_t workspace_limit) {
  Options options;
  options.backend = Backend::cuda;
  options.cuda_device = support().devices.empty() ? 0 : device().index;
  options.cuda_kernels = family;
  options.workspace_limit = workspace_limit;
  return options;
}

std::size_t least_workspace(const Problem& problem, const std::string& family) {
  try {
    const Plan plan(problem, cuda_options(family, 1));
  } catch (const Error& error) {
    const std::string message = error.what(), mark = "at least ";
    const std::size_t at = message.find(mark);
    return at == std::string::npos ? 0 : std::stoull(message.substr(at + mark.size()));
  }
  return 0;
}

std::size_t most_workspace(const Problem& problem, const std::string& family) {
  const Plan plan(problem, cuda_options(family));
  return std::max(plan.workspace_bytes(), plan.backward_workspace_bytes());
}

std::uint64_t run_seed() {
  static const std::uint64_t seed = [] {
    const char* given = std::getenv("MOBA_SEED");
    const std::uint64_t made = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()() % 1000000;
    std::printf("MOBA_SEED=%llu\n", static_cast<unsigned long long>(made));
    return made;
  }();
  return seed;
}

int random_cases(int default_count) {
  const char* given = std::getenv("MOBA_CUDA_CASES");
  return given != nullptr ? std::atoi(given) : default_count;
}

void in_parallel(std::size_t n, const std::function<void(std::size_t)>& f) {
  std::atomic<std::size_t> next = 0;
  std::vector<std::thread> workers;
  const std::size_t count = std::min<std::size_t>(n, std::max(1u, std::thread::hardware_concurrency()));
  for (std::size_t i = 0; i < count; ++i) {
    workers.emplace_back([&] {
      for (std::size_t task = next++; task < n; task = next++) f(task);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

CpuJudge::CpuJudge(const Case& c, const Data& data, const Chosen* chosen)
    : data_(in_float32(c)), run_(in_float32(c).problem(), {.threads = 1}) {
  widen(data_.q, data.q);
  widen(data_.k, data.k);
  widen(data_.v, data.v);
  if (chosen == nullptr) return;
  chosen_.emplace(run_.plan(), Layout{}, chosen->ids.dim(1) == c.kv_heads);
  for (std::int64_t token = 0; token < chosen_->ids.dim(0); ++token) {
    for (std::int64_t head = 0; head < chosen_->ids.dim(1); ++head) {
      chosen_->set_row(token, head, chosen->row(token, head));
    }
  }
  run_.index(data_.inputs(), *chosen_);
}

Attention CpuJudge::rows() { return chosen_ ? run_.attend(data_.inputs(), *chosen_) : run_.dense(data_.inputs()); }

Slopes CpuJudge::gradients(const Array& dout, const Attention* results) {
  Attention wide = results == nullptr ? rows() : Attention(run_.plan().problem());
  if (results != nullptr) {
    widen(wide.out, results->out);
    widen(wide.lse, results->lse);
  }
  Array wide_dout(DType::f32, {dout.dim(0), dout.dim(1), dout.dim(2)});
  widen(wide_dout, dout);
  return chosen_ ? run_.backward(data_.inputs(), *chosen_, wide, wide_dout)
                 : run_.dense_backward(data_.inputs(), wide, wide_dout);
}

reference::Rows cpu_rows(const Case& c, const Data& data, const Chosen* chosen) {
  const Attention result = CpuJudge(c, data, chosen).rows();
  return {result.out.numbers(), result.lse.numbers()};
}

::testing::AssertionResult near(const Attention& got, const reference::Rows& expected, DType dtype, double extra) {
  const Summary::Worst errors = errors_of(got, expected);
  if (extra == 0) {
    const std::lock_guard lock(summary().mutex);
    Summary::Worst& worst = summary().worst[dtype];
    worst.row = std::max(worst.row, errors.row);
    worst.tensor = std::max(worst.tensor, errors.tensor);
    worst.lse = std::max(worst.lse, errors.lse);
  }
  constexpr double kLse = 1e-4;
  if (const auto result = close(got, expected, dtype, extra, kLse); !result) return result;
  if (errors.tensor > tensor_tolerance(dtype) + extra) {
    return ::testing::AssertionFailure() << "relative error of the tensor is " << errors.tensor;
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult explained_picks(const Case& c, const Inputs& inputs, const Array& centroids,
                                           const Chosen& expected, const Chosen& got) {
  const auto result = explained(c, inputs, centroids, expected, got);
  std::int64_t picks = 0, others = 0;
  for (std::int64_t token = 0; token < c.total_q(); ++token) {
    for (std::int64_t head = 0; head < c.q_heads; ++head) {
      const std::vector<std::int32_t> theirs = expected.row(token, head);
      for (const std::int32_t id : got.row(token, head)) others += !std::ranges::binary_search(theirs, id);
      picks += std::ssize(theirs);
    }
  }
  const std::lock_guard lock(summary().mutex);
  summary().picks += picks;
  summary().other_picks += others;
  return result;
}

::testing::AssertionResult mostly_equal(const Array& got, const Array& expected) {
  const std::vector<std::uint64_t> is = got.bits(), should = expected.bits();
  std::int64_t others = 0;
  for (std::size_t i = 0; i < is.size(); ++i) {
    if (is[i] == should[i]) continue;
    ++others;
    if (std::abs(ordered(is[i]) - ordered(should[i])) > 1) {
      return ::testing::AssertionFailure() << "element " << i << " has bits " << is[i] << ", expected " << should[i];
    }
  }
  const std::lock_guard lock(summary().mutex);
  summary().elements += std::ssize(is);
  summary().other_elements += others;
  if (others > std::ssize(is) / 65536 + 1) {
    return ::testing::AssertionFailure() << others << " of " << is.size() << " elements differ";
  }
  return ::testing::AssertionSuccess();
}

}  // namespace moba::test
