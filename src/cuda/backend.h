// The cuda backend as the rest of the library sees it; no CUDA header is needed. A build without CUDA has absent.cc in
// place of everything else in this folder.
#pragma once

#include <string>

#include "call.h"
#include "moba/info.h"
#include "plan_impl.h"

namespace moba::cuda {

extern const Steps kSteps;

// Refuses options.cuda_device where it is not there: no CUDA in the build, no driver, no such device.
void check_device(int device);

// Fills in the cuda part of a plan, or refuses it: a device, a problem or an option that the kernels do not serve.
void prepare(Plan::Impl& plan);

// "cuda (NVIDIA H200): gate sm90, attend resident sm90, 2 passes"
std::string describe_kernels(const Plan::Impl& plan);

CudaSupport support();

// Where memory lies, as the driver sees it: the device's index, or -1 for memory that no device can reach as its own.
int device_of(const void* pointer);

}  // namespace moba::cuda
