// The cuda backend as the rest of the library sees it; no CUDA header is needed. A build without CUDA has absent.cc in
// place of everything else in this folder.
#pragma once

#include <functional>
#include <string>

#include "call.h"
#include "moba/info.h"
#include "plan_impl.h"

namespace moba::cuda {

extern const Steps kSteps;
// Those of them that are in backward.cc.
void backward(const Call& call, const Selection& selection, const Cotangents& given, const Gradients& gradients);
void dense_backward(const Call& call, const Cotangents& given, const Gradients& gradients);

// Refuses options.cuda_device where it is not there: no CUDA in the build, no driver, no such device.
void check_device(int device);

// Fills in the cuda part of a plan, or refuses it: a device, a problem or an option that the kernels do not serve.
void prepare(Plan::Impl& plan);

// "cuda (NVIDIA H200): gate sm90, attend resident sm90, 2 slabs; backward sm90, 4 slabs"
std::string describe_kernels(const Plan::Impl& plan);

// forward, for who times it: `done` is called with the name of each stage when its kernels are on the stream: batch,
// pool (or rope, which pools as well), then for each slab gate, index, units, attend, merge.
void forward_by_stages(const Call& call, const Intermediates& memory, const Outputs& outputs,
                       const std::function<void(const char*)>& done);

// The same of backward: batch, then for each slab index, and for each pass over parts of the blocks units, products,
// shares (dk, dv), queries (dq). The first pass of a slab also has keys (those of no unit), before units, and rows,
// behind it; where dk and dv are sums over slabs of tokens, keys (the sums, rounded) stands behind the last slab of a
// key head instead. rope at the end, if the plan has one.
void backward_by_stages(const Call& call, const Selection& selection, const Cotangents& given,
                        const Gradients& gradients, const std::function<void(const char*)>& done);

CudaSupport support();

// Where memory lies, as the driver sees it: the device's index, or -1 for memory that no device can reach as its own.
int device_of(const void* pointer);

}  // namespace moba::cuda
