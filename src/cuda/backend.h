// The cuda backend as the rest of the library sees it; no CUDA header is needed. A build without CUDA has absent.cc in
// place of everything else in this folder.
#pragma once

#include <string>

#include "call.h"
#include "moba/info.h"
#include "plan_impl.h"

namespace moba::cuda {

extern const Steps kSteps;

// Fills in the cuda part of a plan, or refuses it: no CUDA in the build, no driver, no such device, a problem or an
// option that the kernels do not serve.
void prepare(Plan::Impl& plan);

// "cuda sm90 (NVIDIA H200): ..."
std::string describe_kernels(const Plan::Impl& plan);

CudaSupport support();

// Where memory lies, as the driver sees it: the device's index, or -1 for memory that no device can reach as its own.
int device_of(const void* pointer);

}  // namespace moba::cuda
