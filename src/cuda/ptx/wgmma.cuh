// Warpgroup matrix products (sm_90a): d [64, N] (+)= a [64, 16] b [16, N], N = 2 * registers of d, float32
// accumulation. A warpgroup is four warps from a multiple of four on; warp w holds rows 16w .. 16w + 15. Within a warp
// lane 4r + c holds columns 8j + 2c, + 1 of row r in d[4j], d[4j + 1] and of row r + 8 in d[4j + 2], d[4j + 3].
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace moba::cuda::ptx {

// Registers of a product may be touched by others only between a fence before and a wait behind it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}
// Keeps the compiler from moving uses of d across this point.
template <int n>
__device__ __forceinline__ void pin(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of an operand in shared memory: rows of 128 bytes, 16-byte chunk c of row r at place c ^ (r % 8), groups
// of 8 rows 1024 bytes apart, 1024-byte aligned. For an operand that is contiguous along k (K-major) `wide` is not
// used; for one contiguous along N (MN-major), 64 columns to a row, it is the distance in bytes from 64 columns to the
// next 64. The low word counts 16 bytes: adding n to it moves the operand by 16 n bytes. The high word never changes.
__device__ __forceinline__ std::uint32_t operand(std::uint32_t address, std::uint32_t wide = 16) {
  return ((address & 0x3ffff) >> 4) | ((wide >> 4) << 16);
}
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t low_word) {
  std::uint64_t both;
  asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(low_word), "r"(0x40000040u));
  return both;
}

#define MOBA_REGISTERS_32                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define MOBA_ACCUMULATORS_32                                                                                  \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MOBA_REGISTERS_64                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define MOBA_ACCUMULATORS_64                                                                                  \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

#define MOBA_WGMMA_SHARED(N, REGISTERS, ACCUMULATORS, TYPE, A, B, P, MAJOR)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " " REGISTERS ", %" A ", %" B ", p, 1, 1, 0, %" MAJOR ";\n}"                              \
               : ACCUMULATORS                                                                                     \
               : "l"(descriptor(a)), "l"(descriptor(b)), "r"(static_cast<int>(accumulate)),                       \
                 "n"(static_cast<int>(kMajor)))

enum Major { kMajorK = 0, kMajorN = 1 };

// a K-major and b as said, in shared memory, as low words of descriptors. Without `accumulate` d is overwritten.
template <class T, Major kMajor = kMajorK>
__device__ __forceinline__ void wgmma(float (&d)[64], std::uint32_t a, std::uint32_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_SHARED("128", MOBA_REGISTERS_64, MOBA_ACCUMULATORS_64, "bf16", "64", "65", "66", "67");
  } else {
    MOBA_WGMMA_SHARED("128", MOBA_REGISTERS_64, MOBA_ACCUMULATORS_64, "f16", "64", "65", "66", "67");
  }
}
template <class T, Major kMajor = kMajorK>
__device__ __forceinline__ void wgmma(float (&d)[32], std::uint32_t a, std::uint32_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_SHARED("64", MOBA_REGISTERS_32, MOBA_ACCUMULATORS_32, "bf16", "32", "33", "34", "35");
  } else {
    MOBA_WGMMA_SHARED("64", MOBA_REGISTERS_32, MOBA_ACCUMULATORS_32, "f16", "32", "33", "34", "35");
  }
}

// d[i][n] += 2 sum_j a[i % 8][j] b[n][j] over 8 bfloat16 j, whatever the type of other products of d: rows of 16 bytes
// in shared memory, behind one another, 8 of a and 64 of b, at addresses that are multiples of 16. Twice, for a product
// has 16 of k, and takes the same rows for both halves.
__device__ __forceinline__ void wgmma_add_terms(float (&d)[32], std::uint32_t a, std::uint32_t b) {
  // No swizzle, 8x8 tiles of 128 bytes: the next ones along k, and for a along its rows, are 0 bytes away.
  std::uint64_t of_a, of_b;
  asm("mov.b64 %0, {%1, %2};" : "=l"(of_a) : "r"(a >> 4), "r"(0));
  asm("mov.b64 %0, {%1, %2};" : "=l"(of_b) : "r"(b >> 4), "r"(128 >> 4));
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " MOBA_REGISTERS_32 ", %32, %33, 1, 1, 1, 0, 0;"
               : MOBA_ACCUMULATORS_32
               : "l"(of_a), "l"(of_b));
}

#define MOBA_WGMMA_REGISTERS(N, REGISTERS, ACCUMULATORS, TYPE, A, B, P)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
               "." TYPE " " REGISTERS ", " A ", %" B ", p, 1, 1, 1;\n}"                                           \
               : ACCUMULATORS                                                                                     \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor(b)), "r"(static_cast<int>(accumulate)))

// a is read while the product runs, but to ptxas its registers are free once the product is issued: it may put there
// what is computed before the wait (seen with CUDA 13.0). So compute little between issue and wait, and never the a of
// a product to come, and have the machine code checked (scripts/check_operands.py).
//
// a in registers, as the pairs of an accumulator's columns: with P [64, 16] at columns 16 i of a product, a0 is the
// pair d[8i], d[8i + 1], a1 d[8i + 2], d[8i + 3], a2 d[8i + 4], d[8i + 5], a3 d[8i + 6], d[8i + 7]. b MN-major.
template <class T>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                                std::uint32_t a3, std::uint32_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_REGISTERS("128", MOBA_REGISTERS_64, MOBA_ACCUMULATORS_64, "bf16", "{%64, %65, %66, %67}", "68", "69");
  } else {
    MOBA_WGMMA_REGISTERS("128", MOBA_REGISTERS_64, MOBA_ACCUMULATORS_64, "f16", "{%64, %65, %66, %67}", "68", "69");
  }
}
template <class T>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                                std::uint32_t a3, std::uint32_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    MOBA_WGMMA_REGISTERS("64", MOBA_REGISTERS_32, MOBA_ACCUMULATORS_32, "bf16", "{%32, %33, %34, %35}", "36", "37");
  } else {
    MOBA_WGMMA_REGISTERS("64", MOBA_REGISTERS_32, MOBA_ACCUMULATORS_32, "f16", "{%32, %33, %34, %35}", "36", "37");
  }
}

#undef MOBA_WGMMA_SHARED
#undef MOBA_WGMMA_REGISTERS
#undef MOBA_REGISTERS_32
#undef MOBA_REGISTERS_64
#undef MOBA_ACCUMULATORS_32
#undef MOBA_ACCUMULATORS_64

}  // namespace moba::cuda::ptx
