// backward for d 64 and 128 (sm_90a), key-major: the rows of a list are gathered, 64 to a tile, and meet the K and V of
// up to 128 keys, which stay for the whole unit, as do their dK and dV, in registers.
//
// A CTA per SM takes units by ticket. Of its warpgroups one produces; two have 64 keys each and compute, for a tile,
//   S^T [64 keys, 64 rows] = K Q^T - lse    operands from shared memory; lse / scale, as terms (row_terms.cuh)
//   P^T = exp2(c S^T)                       in 16 bits
//   dV [64 keys, d] += P^T dO               P^T from registers
//   dP^T [64 keys, 64 rows] = V dO^T - delta
//   dS^T = P^T dP^T                         in 16 bits; also to shared memory, as dS [64 rows, 128 keys]
//   dK [64 keys, d] += dS^T Q               dS^T from registers
// and the last, with few registers, computes dQ [64 rows, d] = dS K, which goes to the entries of the rows, rounded; no
// two units write the same place, so nothing is added up atomically.
//
// What bounds it on an H200: shared memory (78 % busy before terms took the place of reads of lse and delta), the way
// to memory of what is gathered, and, from some tens of milliseconds on, the power limit. Shared memory and the
// barriers, pairs full/empty, are described in backward_sm90_shared.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "cuda/backward_sm90_keys.cuh"
#include "cuda/backward_sm90_producers.cuh"
#include "cuda/backward_sm90_shared.cuh"
#include "cuda/contract.h"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/row_terms.cuh"
#include "cuda/tensor_map.h"

namespace moba::cuda {
namespace gradient {
namespace {

// The dQ warpgroup. Short keys came by cp.async: the key warpgroups fence them for wgmma before they hand over dS. 64
// columns at a time: all of 128 would read dS once less, but take 32 registers that are not left.
template <class T, int d>
__device__ __forceinline__ void multiply_queries(const Arguments& arguments, std::uint32_t base, const Unit* ring) {
  using L = Layout<d>;
  const int t = threadIdx.x % 128, lane = t % 32, warp = __shfl_sync(kAllLanes, t / 32, 0), row = warp * 16 + lane / 4;
  constexpr int kRowBytes = d * 2;
  int parity = 0;
  for (int n = 0;; ++n) {
    const int stage = n & 1;
    ptx::barrier_wait(base + L::kKeyFull + stage * 8, (n >> 1) & 1);
    const Unit& unit = ring[stage];
    int left = unit.rows;
    if (left == 0) return;
    char* to = arguments.dq + (unit.part * arguments.part_stride + unit.first + row) * kRowBytes + lane % 4 * 16;
    for (; left > 0; left -= kTileRows, to += kTileRows * kRowBytes) {
      ptx::barrier_wait(base + L::kDSFull, parity);
      parity ^= 1;
#pragma unroll
      for (int band = 0; band < d / kBandColumns; ++band) {
        float dq[32];
        const std::uint32_t ds = ptx::operand(base + L::kDS);
        const std::uint32_t keys = ptx::operand(base) + stage * (L::kKeyStage / 16) + band * (L::kKeyBand / 16);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < L::kKeys / 16; ++k) {
          ptx::wgmma<T, ptx::kMajorN>(dq, ds + k / 4 * (L::kTileBand / 16) + k % 4 * 2, keys + k * kBandBytes, k > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::pin(dq);
        if (band == d / kBandColumns - 1) ptx::barrier_arrive_if(lane == 0, base + L::kDSEmpty);
        const auto word = [&](int i) { return ptx::pack<T>(dq[i] * arguments.scale, dq[i + 1] * arguments.scale); };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (left <= row + 8 * half) continue;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const int i = 16 * m + 2 * half;
            __stcs(reinterpret_cast<uint4*>(to + 8 * half * kRowBytes + (2 * band + m) * 64),
                   make_uint4(word(i), word(i + 4), word(i + 8), word(i + 12)));
          }
        }
      }
    }
    ptx::barrier_arrive(base + L::kKeyEmpty + stage * 8);  // every lane, for every lane has read the unit
  }
}

template <class T, int d>
__global__ void __launch_bounds__(Layout<d>::kThreads, 1)
    backward_units(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                   const __grid_constant__ Arguments arguments) {
  using L = Layout<d>;
  extern __shared__ __align__(1024) char shared[];
  const std::uint32_t base = ptx::shared_address(shared);
  Unit* ring = reinterpret_cast<Unit*>(shared + L::kRing);
  // By a shuffle, so that the compiler knows it to be the same in the whole warp.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(base + L::kKeyFull + i * 8, kProducers + 1);
      ptx::barrier_init(base + L::kKeyEmpty + i * 8, (kKeyWarps + kQueryWarps) * 32);
    }
    for (int i = 0; i < L::kQStages; ++i) {
      ptx::barrier_init(base + L::kQFull + i * 8, kProducers);
      ptx::barrier_init(base + L::kQEmpty + i * 8, kKeyWarps);
    }
    for (int i = 0; i < L::kDOStages; ++i) {
      ptx::barrier_init(base + L::kDOFull + i * 8, kProducers);
      ptx::barrier_init(base + L::kDOEmpty + i * 8, kKeyWarps);
    }
    ptx::barrier_init(base + L::kDSFull, kKeyWarps);
    ptx::barrier_init(base + L::kDSEmpty, kQueryWarps);
    ptx::fence_barrier_init();
  }
  if (threadIdx.x < 16) {
    reinterpret_cast<uint4*>(shared + L::kWeights)[threadIdx.x] = term_weights(threadIdx.x / 8);
    ptx::fence_async_proxy();
  }
  ptx::start_behind_previous();
  __syncthreads();
  if (warpgroup == 3) {
    ptx::lower_registers<L::kProducerRegisters>();
    produce<d>(k_map, v_map, arguments, base, ring);
  } else if (warpgroup == 2) {
    ptx::lower_registers<L::kQueryRegisters>();
    multiply_queries<T, d>(arguments, base, ring);
  } else {
    ptx::raise_registers<L::kKeyRegisters>();
    multiply_keys<T, d>(arguments, base, ring, warpgroup);
  }
}

Arguments arguments_of(const Shape& shape, Slab slab, const BackwardInput& input, const UnitList& list,
                       const BackwardOutput& output) {
  const std::int64_t rows = std::int64_t{slab.tokens} * shape.group;
  return {.keys = key_source(list, input.k, input.v),
          .rows = input.rows,
          .q = RowAddresses(input.q, shape.group),
          .dout = RowAddresses(input.dout, shape.group),
          .terms = input.values.terms,
          .head_terms = rows,
          .first_term = slab.head_begin * rows + std::int64_t{slab.token_begin} * shape.group,
          .no_row = slab.heads * rows,
          .dq = static_cast<char*>(output.dq),
          .part_stride = output.part_stride,
          .shares = output.shares,
          .dk = output.dk,
          .dv = output.dv,
          .totals = output.totals,
          .by_group = Divide(shape.group),
          .group = shape.group,
          .scale = shape.scale,
          .factor = static_cast<float>(std::max(shape.scale, kLeastScale) * std::numbers::log2e)};
}

template <class T, int d>
void launch_backward(const Shape& shape, const BackwardInput& input, const Arguments& arguments, cudaStream_t stream) {
  using L = Layout<d>;
  const auto map = [&](const View<const void>& view) {
    return tensor_map_3d(shape.dtype, view, d, shape.kv_heads, shape.total_k, L::kKeys);
  };
  launch(Start::early, backward_units<T, d>, dim3(static_cast<unsigned>(shape.sm_count)), L::kThreads, L::kBytes,
         stream, map(input.k), map(input.v), arguments);
}

template <class T>
void launch_backward(const Shape& shape, const BackwardInput& input, const Arguments& arguments, cudaStream_t stream) {
  (shape.head_dim == 128 ? launch_backward<T, 128> : launch_backward<T, 64>)(shape, input, arguments, stream);
}

}  // namespace
}  // namespace gradient

void backward_sm90(const Shape& shape, Slab slab, const BackwardInput& input, const UnitList& list,
                   const BackwardOutput& output, cudaStream_t stream) {
  if (shape.total_q == 0 || shape.total_k == 0) return;
  const gradient::Arguments arguments = gradient::arguments_of(shape, slab, input, list, output);
  (shape.dtype == DType::bf16 ? gradient::launch_backward<__nv_bfloat16>
                              : gradient::launch_backward<__half>)(shape, input, arguments, stream);
}

}  // namespace moba::cuda
