// What two kernels of a stream owe each other where the later one is launched early or beside the earlier (launch.h).
// Nothing before sm_90, where kernels run one after the other.
#pragma once

namespace moba::cuda::ptx {

// The kernel behind may start once every CTA has come here, or has ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The kernel goes on when the one before it has ended and what it wrote can be seen; the kernel behind may start.
__device__ __forceinline__ void start_behind_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The kernel ends behind the one before it: its last CTA waits until that has ended and what it wrote can be seen.
__device__ __forceinline__ void end_behind_previous() {
#if __CUDA_ARCH__ >= 900
  if (blockIdx.x + 1 == gridDim.x && blockIdx.y + 1 == gridDim.y) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace moba::cuda::ptx
