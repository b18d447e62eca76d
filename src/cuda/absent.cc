// The cuda backend of a build without CUDA: refuses plans and says why.
#include "cuda/backend.h"
#include "refuse.h"

namespace moba::cuda {
namespace {

const char* const kNotBuilt = "this library was built without CUDA (configure with -DMOBA_CUDA=ON where nvcc is)";

}  // namespace

void prepare(Plan::Impl&) {}  // check_device has refused it

void check_device(int) { refuse("options.backend", "cuda", std::string("cpu, reference: ") + kNotBuilt); }

std::string describe_kernels(const Plan::Impl&) { return "cuda"; }

CudaSupport support() {
  CudaSupport support;
  support.problem = kNotBuilt;
  return support;
}

int device_of(const void*) { return -1; }

}  // namespace moba::cuda
