// attend_stream for Hopper: up to 128 rows of a list, or 128 consecutive rows, against any number of keys.
// q rows [128, d] stay in shared memory; k and v stream by in tiles of 128 keys; d is 64 or 128.
//
// A thread block stays on its multiprocessor and takes units by ticket. Two consumer warpgroups own 64 rows each:
//   S [64, 128] = Q K^T              both from shared memory      64 registers
//   P = exp2(S c - reference)        running reference, see below 32 registers, the left operand of
//   O [64, d] += P V                 V from shared memory         d / 2 registers
// S of the next tile is issued before P V of this one, and the softmax of the next tile runs under that product. The
// tiles of all units form one stream: the first S of a unit overlaps the last P V of the unit before. The warpgroups
// issue their products in turn, so that one computes exponentials while the other multiplies.
// Four producer warps, one task each: publish units, load k, load v, gather q. Every buffer has a `full` and an `empty`
// barrier; whoever fills it waits for empty, whoever reads it for full, always in the order of the stream.
//
// Masked keys have no influence, even if their values are NaN, which 0 * NaN in P V would break: tiles of v that not
// all rows of the unit see come without what is behind the unit's keys and with non-finite values replaced by 0, and
// the consumers add those to the rows that see them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <numbers>

#include "cuda/attend_stream_producers.cuh"
#include "cuda/attend_stream_rows.cuh"
#include "cuda/attend_stream_shared.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"

namespace moba::cuda {
namespace streaming {
namespace {

template <class T>
__device__ __forceinline__ void pack_weights(std::uint32_t (&p)[32], const float (&s)[64]) {
#pragma unroll
  for (int j = 0; j < 32; ++j) p[j] = ptx::pack<T>(s[2 * j], s[2 * j + 1]);
}

template <class T, int d>
__device__ __forceinline__ void issue_scores(float (&s)[64], std::uint32_t q, std::uint32_t k) {
  ptx::wgmma_fence();
  const std::uint32_t a = ptx::operand(q), b = ptx::operand(k);
#pragma unroll
  for (int i = 0; i < d / 16; ++i) {
    const int step = i / 4 * (kHalfBytes / 16) + i % 4 * 2;
    ptx::wgmma<T>(s, a + step, b + step, i > 0);
  }
  ptx::wgmma_commit();
}

template <class T, int d>
__device__ __forceinline__ void issue_output(float (&o)[d / 2], const std::uint32_t (&p)[32], std::uint32_t v,
                                             bool accumulate) {
  ptx::wgmma_fence();
  const std::uint32_t b = ptx::operand(v, kHalfBytes);
#pragma unroll
  for (int i = 0; i < kTileKeys / 16; ++i) {
    ptx::wgmma_registers<T>(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], b + i * 128, accumulate || i > 0);
  }
  ptx::wgmma_commit();
}

template <class T, int d>
__device__ void attend_tasks(std::uint32_t shared, Control& control, const Arguments& arguments, int warpgroup) {
  using L = Layout<d>;
  const int lane = threadIdx.x % 32, c = lane % 4;
  const bool leader = lane == 0;
  const int place = threadIdx.x / 32 * 16 + lane / 4;  // of the lane's first row in the unit
  const std::uint32_t q = shared + L::kQueries + warpgroup * (kHalfBytes / 2);
  float s[64], o[d / 2], factor[2];
  std::uint32_t p[32];
  Ring<L::kKeyStages> keys;
  Ring<L::kValueStages> values;

  if (wait_task(control, 0).rows == 0) return;
  int n = 0, tile = 0, tiles = control.tasks_of[0].tiles();  // of the tile whose weights are in p
  RowPair rows(control.tasks_of[0], place, arguments);
  wait(control.queries[0].full, 0);
  wait(control.keys[0].full, 0);
  issue_scores<T, d>(s, q, shared + L::kKeys);
  ptx::wgmma_wait<0>();
  ptx::pin(s);
  arrive_if(leader, control.keys[0].empty);
  arrive_if(leader && tiles == 1, control.queries[0].empty);
  keys.advance();
  mask(s, rows, 0, c);
  softmax(s, rows, arguments.scale, factor);
  pack_weights<T>(p, s);

  // The warpgroups' turns: named barrier 1 + w is warpgroup w's.
  constexpr int kTurnThreads = 128 * kConsumers;
  if (warpgroup == 1) ptx::named_barrier_arrive(1, kTurnThreads);
  bool more = true;
  do {  // no product is in flight here, or ptxas would serialise all of them (C7514)
    const Task& task = control.tasks_of[n % kTasks];
    const bool opening = tile == 0, closing = tile + 1 == tiles;
    const int this_tile = tile, this_task = n;
    if (closing) {
      more = wait_task(control, ++n).rows > 0;
      if (more) wait(control.queries[n % kQueryStages].full, n / kQueryStages & 1);
    }
    if (more) wait(control.keys[keys.stage].full, keys.parity);
    ptx::named_barrier(1 + warpgroup, kTurnThreads);
    // Behind the very last tile a product that nobody reads, which keeps the control flow simple.
    issue_scores<T, d>(s, q + n % kQueryStages * L::kTileBytes, shared + L::kKeys + keys.stage * L::kTileBytes);
    wait(control.values[values.stage].full, values.parity);
    issue_output<T, d>(o, p, shared + L::kValues + values.stage * L::kTileBytes, !opening);
    if (more || warpgroup == 0) ptx::named_barrier_arrive(2 - warpgroup, kTurnThreads);

    if (closing) {
      close_rows(rows, task, place, c, arguments, factor);
      const Task& next = control.tasks_of[n % kTasks];
      rows = RowPair(next, place, arguments);
      tiles = next.tiles();
      tile = 0;
    } else {
      ++tile;
    }
    ptx::wgmma_wait<1>();
    ptx::pin(s);
    arrive_if(leader && more, control.keys[keys.stage].empty);
    arrive_if(leader && more && tile + 1 == tiles, control.queries[n % kQueryStages].empty);
    mask(s, rows, tile, c);
    float change[2];
    const bool changed = softmax(s, rows, arguments.scale, change);
    ptx::pin(s);
    // Ends P V. Called behind a branch in both cases: ptxas moves the wait up across the exponentials otherwise.
    const auto finish_output = [&] {
      ptx::wgmma_wait<0>();
      ptx::pin(o);
      if (task.mixed(this_tile) && control.non_finite[values.stage] != 0) {
        add_non_finite<T, d>(o, task, this_tile, place, c, arguments);
      }
      __syncwarp();
      arrive_if(leader, control.values[values.stage].empty);
    };
    if (closing) {
      finish_output();
      store_output<T, d>(o, factor, task, place, c, arguments);
      __syncwarp();
      arrive_if(leader, control.tasks[this_task % kTasks].empty);
    } else {
      finish_output();
      if (changed) {
#pragma unroll
        for (int j = 0; j < d / 2; ++j) o[j] *= change[j / 2 % 2];
      }
    }
    pack_weights<T>(p, s);
    keys.advance();
    values.advance();
  } while (more);
}

template <class T, int d>
__global__ void __launch_bounds__(kThreads, 1)
    attend_stream_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                         const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) char shared[];
  using L = Layout<d>;
  Control& control = *reinterpret_cast<Control*>(shared + L::kControl);
  if (threadIdx.x == 0) {
    const auto init = [](Control::Barriers& barriers, int readers) {
      ptx::barrier_init(ptx::shared_address(&barriers.full), 1);
      ptx::barrier_init(ptx::shared_address(&barriers.empty), readers);
    };
    for (Control::Barriers& barriers : control.queries) init(barriers, kConsumerWarps);
    for (Control::Barriers& barriers : control.keys) init(barriers, kConsumerWarps);
    for (Control::Barriers& barriers : control.values) init(barriers, kConsumerWarps);
    for (Control::Barriers& barriers : control.tasks) init(barriers, kConsumerWarps + 3);  // and the loaders of q, k, v
    control.tiles_loaded = 0;
    ptx::fence_barrier_init();
  }
  ptx::start_behind_previous();
  __syncthreads();
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < kConsumerWarps) {
    ptx::raise_registers<kConsumerRegisters>();
    attend_tasks<T, d>(ptx::shared_address(shared), control, arguments, warp / 4);
  } else {
    ptx::lower_registers<kProducerRegisters>();
    const bool leader = threadIdx.x % 32 == 0;
    if (warp == kConsumerWarps) {
      if (leader) load_keys<d>(ptx::shared_address(shared), control, k_map);
    } else if (warp == kConsumerWarps + 1) {
      load_values<T, d>(shared, control, v_map, arguments);
    } else if (warp == kConsumerWarps + 2) {
      gather_queries<T, d>(ptx::shared_address(shared), control, arguments);
    } else if (leader) {
      publish_tasks<d>(control, arguments);
    }
  }
}

template <class T, int d>
void launch_attend(const Shape& shape, const AttendInput& input, const Arguments& arguments, cudaStream_t stream) {
  const auto map = [&](const View<const void>& view) {
    return tensor_map_3d(shape.dtype, view, d, shape.kv_heads, shape.total_k, kTileKeys);
  };
  launch(Start::early, attend_stream_kernel<T, d>, dim3(static_cast<unsigned>(shape.sm_count)), kThreads,
         kSharedBytes<d>, stream, map(input.k), map(input.v), arguments);
}

}  // namespace
}  // namespace streaming

void attend_stream_sm90(const Shape& shape, const AttendInput& input, const UnitList& units, const AttendOutput& output,
                        cudaStream_t stream) {
  if (shape.total_q == 0 || shape.total_k == 0) return;
  // Never 0, for masked scores are -inf and -inf * 0 is NaN; a score times this is as good as 0.
  const float scale = std::max(static_cast<float>(shape.scale * std::numbers::log2e), FLT_MIN);
  const streaming::Arguments arguments{input, units, output, shape.group, Divide(shape.group), scale};
  const bool bf16 = shape.dtype == DType::bf16;
  if (shape.head_dim == 128) {
    bf16 ? streaming::launch_attend<__nv_bfloat16, 128>(shape, input, arguments, stream)
         : streaming::launch_attend<__half, 128>(shape, input, arguments, stream);
  } else {
    bf16 ? streaming::launch_attend<__nv_bfloat16, 64>(shape, input, arguments, stream)
         : streaming::launch_attend<__half, 64>(shape, input, arguments, stream);
  }
}

}  // namespace moba::cuda
