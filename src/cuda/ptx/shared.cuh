// Loads and stores of shared memory by 32-bit address: one register to an address, immediate offsets.
#pragma once

#include <cstdint>

namespace moba::cuda::ptx {

__device__ __forceinline__ void store_shared(std::uint32_t to, std::uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(std::uint32_t to, std::uint32_t x, std::uint32_t y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ std::uint32_t load_shared(std::uint32_t from) {
  std::uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void load_shared(std::uint32_t from, std::uint32_t& x, std::uint32_t& y) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_shared(std::uint32_t from, std::uint32_t& x, std::uint32_t& y, std::uint32_t& z,
                                            std::uint32_t& w) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "r"(from) : "memory");
}

// If score > bar: stores {x, y, z} at `to` and moves `to` on by `step` bytes. Predicated rather than branched around,
// and one asm, so that the predicate is not kept in a register from where the compiler sees the same comparison
// earlier.
template <int step>
__device__ __forceinline__ void append_if_greater(std::uint32_t& to, float score, float bar, float x, float y, int z) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.gt.f32 p, %1, %2;\n@p st.shared.v2.f32 [%0], {%3, %4};\n@p st.shared.b32 [%0+8], %5;\n"
      "@p add.u32 %0, %0, %6;\n}"
      : "+r"(to)
      : "f"(score), "f"(bar), "f"(x), "f"(y), "r"(z), "n"(step)
      : "memory");
}

// If score >= least: stores x at `to` and moves `to` on by `step` bytes.
template <int step>
__device__ __forceinline__ void append_if_reached(std::uint32_t& to, float score, float least, int x) {
  asm volatile("{\n.reg .pred p;\nsetp.ge.f32 p, %1, %2;\n@p st.shared.b32 [%0], %3;\n@p add.u32 %0, %0, %4;\n}"
               : "+r"(to)
               : "f"(score), "f"(least), "r"(x), "n"(step)
               : "memory");
}
// If score >= least: stores {score, x} at `to` and moves `to` on, in turn to the upper half of its 16 bytes and to the
// lower half of those `step` bytes behind them.
template <int step>
__device__ __forceinline__ void append_half_if_reached(std::uint32_t& to, float score, float least, int x) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 half;\nsetp.ge.f32 p, %1, %2;\n@p st.shared.v2.b32 [%0], {%3, %4};\n"
      "and.b32 half, %0, 8;\n@p mad.lo.u32 %0, half, %5, %0;\n@p add.u32 %0, %0, 8;\n}"
      : "+r"(to)
      : "f"(score), "f"(least), "r"(__float_as_uint(score)), "r"(x), "n"((step - 16) / 8)
      : "memory");
}

}  // namespace moba::cuda::ptx
