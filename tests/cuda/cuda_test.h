// What the tests of the cuda backend share: the device or the reason to skip, runs of the backend on host tensors, and
// the bounds that its results keep.
//
// Environment: MOBA_SEED repeats the random inputs of a run (it prints its seed); MOBA_CUDA_CASES is the number of
// random problems of each property.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device_mirror.h"
#include "support.h"

namespace moba::test {

// Skipped where there is no device, with the reason.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override;
};

// The first device of cuda_support(); only in tests that are not skipped.
const CudaDevice& device();
// The kernel families that the device has for the problem.
std::vector<std::string> families(const Problem& problem);
Options cuda_options(const std::string& family = "", std::size_t workspace_limit = 0);

// The least workspace_limit that a plan takes, as its refusal of less says; and the greater workspace of one without.
std::size_t least_workspace(const Problem& problem, const std::string& family);
std::size_t most_workspace(const Problem& problem, const std::string& family);

// Differs from run to run, and is printed.
std::uint64_t run_seed();
int random_cases(int default_count);

// Calls f(0) ... f(n - 1) on all cores. For the host's part of a test: f may not touch the device.
void in_parallel(std::size_t n, const std::function<void(std::size_t)>& f);

// Runner (../support.h) for the cuda backend: the same functions on the same host tensors, which it copies to the
// device and back. Outputs go there as they are, poisoned; so does the workspace.
class CudaRunner {
 public:
  explicit CudaRunner(const Problem& problem, const Options& options = cuda_options());
  const Plan& plan() const { return *plan_; }

  Attention forward(const Inputs& inputs, const Layout& layout = {});
  Attention forward(const Inputs& inputs, Chosen& chosen, const Layout& layout = {});  // keeps its choice
  Attention dense(const Inputs& inputs, const Layout& layout = {});
  Attention attend(const Inputs& inputs, Chosen& chosen, const Layout& layout = {});
  Attention merge(std::vector<Attention>& partials, const Layout& layout = {});
  Slopes backward(const Inputs& inputs, Chosen& chosen, Attention& results, const Array& dout,
                  const Layout& layout = {});
  Slopes dense_backward(const Inputs& inputs, Attention& results, const Array& dout, const Layout& layout = {});
  Array pool(const Inputs& inputs, const Layout& layout = {});
  Chosen gate(const Inputs& inputs, const Array& centroids, const Layout& layout = {});
  Chosen select(const Inputs& inputs, const Layout& layout = {});
  void index(const Inputs& inputs, Chosen& chosen);
  std::pair<Array, Array> rope(const Inputs& inputs, const Layout& layout = {});

 private:
  Workspace fresh(std::unique_ptr<DeviceMemory>& memory, std::size_t bytes) const;
  Workspace fresh_workspace();
  Workspace fresh_backward_workspace();

  cudaStream_t stream_;
  std::unique_ptr<Mirror> table_;  // of a rope of the caller's
  std::unique_ptr<Plan> plan_;
  std::unique_ptr<DeviceMemory> workspace_, backward_workspace_;
};

// A stream of the process that does not wait for the default stream.
cudaStream_t test_stream();

// A case in float32 for the cpu backend, which is then within 1e-5 of float64: the judge of problems that float64 has
// no time for. One thread: many may judge at once.
class CpuJudge {
 public:
  CpuJudge(const Case& c, const Data& data, const Chosen* chosen);  // null: dense
  Attention rows();
  // Those of q and k as they are. `results` null: of the cpu's own.
  Slopes gradients(const Array& dout, const Attention* results);

 private:
  Data data_;
  Runner run_;
  std::optional<Chosen> chosen_;
};
reference::Rows cpu_rows(const Case& c, const Data& data, const Chosen* chosen);

// Every row within docs/spec.md section 10, lse within 1e-4 (relative above 1), the whole tensor within 4e-3 (bf16;
// 1e-3 for f16). Notes the worst for the summary that the program ends with.
::testing::AssertionResult near(const Attention& got, const reference::Rows& expected, DType dtype, double extra = 0);

// explained() (../support.h), counting for the summary the choices that differ from the reference's.
::testing::AssertionResult explained_picks(const Case& c, const Inputs& inputs, const Array& centroids,
                                           const Chosen& expected, const Chosen& got);

// Counts elements that are not the same bits, for the summary; they may be neighbours, and one in 2^16 of all.
::testing::AssertionResult mostly_equal(const Array& got, const Array& expected);

}  // namespace moba::test
