// Copies from global to shared memory: cp.async; the bulk tensor copy and prefetch are for sm_90a files.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace moba::cuda::ptx {

// 16 bytes; `bytes` < 16 fills the rest with zeros (0: nothing is read).
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Arrives at the barrier when all earlier cp.async of this thread have landed; counts as one of its arrivals.
__device__ __forceinline__ void copy_async_arrive(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// sm_90a: a box of a 3-d tensor map at (x, y, z), innermost first; its bytes count at the barrier.
__device__ __forceinline__ void copy_tensor_3d(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int x,
                                               int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

}  // namespace moba::cuda::ptx
