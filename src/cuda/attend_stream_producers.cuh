// The producer warps of attend_stream_sm90.cu, one task each: publish units, load k, load v, gather q.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attend_stream_shared.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/swizzle.cuh"
#include "cuda/visible_keys.cuh"

namespace moba::cuda::streaming {

template <int d>
__device__ void publish_tasks(Control& control, const Arguments& arguments) {
  const int count = arguments.units.counters[1];
  const std::int32_t* rows = arguments.input.rows;
  for (int n = 0, tiles = 0;; ++n) {
    while (tiles - atomicAdd(&control.tiles_loaded, 0) >= Layout<d>::kTilesAhead) __nanosleep(100);
    Control::Barriers& barriers = control.tasks[n % kTasks];
    wait(barriers.empty, (n / kTasks & 1) ^ 1);
    const int ticket = atomicAdd(&arguments.units.counters[0], 1);
    Task task{};
    if (ticket < count) {
      const Unit unit = arguments.units.units[ticket];
      task = {unit.first,       unit.head,   unit.key_begin, unit.keys, unit.rows,
              unit.first_token, unit.masked, unit.row0,      unit.keys};
      if (unit.masked > 0) {
        task.common = visible_keys(unit, 0, rows, arguments.by_group);
        // Rows of lists ascend, so the last one sees most.
        if (unit.masked >= unit.rows && unit.row0 >= 0) {
          task.keys = max(1, visible_keys(unit, unit.rows - 1, rows, arguments.by_group));
        }
      }
    }
    tiles += task.tiles();
    control.tasks_of[n % kTasks] = task;
    ptx::barrier_arrive(ptx::shared_address(&barriers.full));
    if (ticket >= count) return;
  }
}

template <int d>
__device__ __forceinline__ void copy_tile(const CUtensorMap& map, std::uint32_t to, std::uint64_t& full,
                                          const Task& task, int tile) {
  const std::uint32_t barrier = ptx::shared_address(&full);
  ptx::barrier_arrive_expect(barrier, Layout<d>::kTileBytes);
#pragma unroll
  for (int half = 0; half < d / 64; ++half) {
    ptx::copy_tensor_3d(to + half * kHalfBytes, &map, barrier, half * 64, task.head, task.key_begin + tile * kTileKeys);
  }
}

// What the last tile holds behind the unit's keys gives scores that are masked, so it may be anything.
template <int d>
__device__ void load_keys(std::uint32_t shared, Control& control, const CUtensorMap& map) {
  using L = Layout<d>;
  Ring<L::kKeyStages> ring;
  for (int n = 0;; ++n) {
    const Task task = wait_task(control, n);
    ptx::barrier_arrive(ptx::shared_address(&control.tasks[n % kTasks].empty));
    if (task.rows == 0) return;
    const int tiles = task.tiles();
    for (int tile = 0; tile < tiles; ++tile) {
      Control::Barriers& barriers = control.keys[ring.stage];
      wait(barriers.empty, ring.parity ^ 1);
      copy_tile<d>(map, shared + L::kKeys + ring.stage * L::kTileBytes, barriers.full, task, tile);
      atomicAdd(&control.tiles_loaded, 1);
      ring.advance();
    }
  }
}

// Rows of 128-byte swizzled halves, shared out over a warp: pass p brings row p * kRowsPerPass + lane / kLanesPerRow,
// 16 bytes a lane.
template <int d>
struct WarpRows {
  static constexpr int kLanesPerRow = d / 8;
  static constexpr int kRowsPerPass = 32 / kLanesPerRow;
  static constexpr int kPasses = 128 / kRowsPerPass;
  int row, chunk;

  __device__ explicit WarpRows(int lane) : row(lane / kLanesPerRow), chunk(lane % kLanesPerRow) {}
  __device__ int row_of(int pass) const { return pass * kRowsPerPass + row; }
  __device__ int offset(int pass) const { return swizzled_band(128, row_of(pass), chunk); }
};

// Replaces the non-finite values among what this lane copied to `tile` by 0; true if there were any in the warp's.
template <class T, int d>
__device__ __forceinline__ bool drop_non_finite(char* tile, const WarpRows<d>& mine) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  using Pair = std::conditional_t<kBf16, __nv_bfloat162, __half2>;
  Pair zero, sums[2];  // of 0 * value: NaN if any is not finite
  zero = sums[0] = sums[1] = Pair{T(0.0f), T(0.0f)};
#pragma unroll 4
  for (int pass = 0; pass < mine.kPasses; ++pass) {
    const uint4 values = *reinterpret_cast<const uint4*>(tile + mine.offset(pass));
    sums[0] = __hfma2(reinterpret_cast<const Pair&>(values.x), zero, sums[0]);
    sums[1] = __hfma2(reinterpret_cast<const Pair&>(values.y), zero, sums[1]);
    sums[0] = __hfma2(reinterpret_cast<const Pair&>(values.z), zero, sums[0]);
    sums[1] = __hfma2(reinterpret_cast<const Pair&>(values.w), zero, sums[1]);
  }
  const Pair sum = __hadd2(sums[0], sums[1]);
  if (!__any_sync(kAllLanes, (reinterpret_cast<const std::uint32_t&>(sum) & 0x7fff7fffu) != 0)) return false;
  constexpr std::uint32_t kExponent = kBf16 ? 0x7f807f80u : 0x7c007c00u, kOne = kBf16 ? 0x00800080u : 0x04000400u;
  for (int pass = 0; pass < mine.kPasses; ++pass) {
    std::uint32_t* words = reinterpret_cast<std::uint32_t*>(tile + mine.offset(pass));
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // an exponent of ones carries into the bit above it
      const std::uint32_t carries = ((words[i] & kExponent) + kOne) >> 15 & 0x00010001u;
      words[i] &= ~(carries * 0xffffu);
    }
  }
  return true;
}

// Tiles that all rows see come by the copy engine. The others: zeros behind the unit's keys, finite values only.
template <class T, int d>
__device__ void load_values(char* shared, Control& control, const CUtensorMap& map, const Arguments& arguments) {
  using L = Layout<d>;
  const View<const void>& v = arguments.input.v;
  const int lane = threadIdx.x % 32;
  const WarpRows<d> mine(lane);
  Ring<L::kValueStages> ring;
  for (int n = 0;; ++n) {
    const Task task = wait_task(control, n);
    __syncwarp();
    arrive_if(lane == 0, control.tasks[n % kTasks].empty);
    if (task.rows == 0) return;
    const int tiles = task.tiles();
    const T* base = static_cast<const T*>(v.data) + task.head * v.head_stride + mine.chunk * 8;
    for (int tile = 0; tile < tiles; ++tile) {
      Control::Barriers& barriers = control.values[ring.stage];
      char* to = shared + L::kValues + ring.stage * L::kTileBytes;
      wait(barriers.empty, ring.parity ^ 1);
      if (!task.mixed(tile)) {
        if (lane == 0) copy_tile<d>(map, ptx::shared_address(to), barriers.full, task, tile);
      } else {
        const int first = tile * kTileKeys;
#pragma unroll 4
        for (int pass = 0; pass < mine.kPasses; ++pass) {
          const int key = first + mine.row_of(pass);
          const std::int64_t token = task.key_begin + min(key, task.keys - 1);
          ptx::copy_async(ptx::shared_address(to + mine.offset(pass)), base + token * v.token_stride,
                          key < task.keys ? 16 : 0);
        }
        ptx::copy_async_wait_all();
        const bool dropped = drop_non_finite<T, d>(to, mine);
        if (lane == 0) control.non_finite[ring.stage] = dropped;
        ptx::fence_async_proxy();
        __syncwarp();
        arrive_if(lane == 0, barriers.full);
      }
      __syncwarp();
      ring.advance();
    }
  }
}

// Rows behind the unit's repeat its last one.
template <class T, int d>
__device__ void gather_queries(std::uint32_t shared, Control& control, const Arguments& arguments) {
  const View<const void>& q = arguments.input.q;
  const int lane = threadIdx.x % 32, group = arguments.group;
  const WarpRows<d> mine(lane);
  for (int n = 0;; ++n) {
    const Task task = wait_task(control, n);
    __syncwarp();
    arrive_if(lane == 0, control.tasks[n % kTasks].empty);
    if (task.rows == 0) return;
    std::int64_t offsets[kRows / 32];  // of rows lane, 32 + lane, ...
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      const int place = min(i * 32 + lane, task.rows - 1);
      const int row = arguments.input.rows == nullptr ? task.row0 + place : arguments.input.rows[task.first + place];
      const int token = arguments.by_group(row);
      offsets[i] = token * q.token_stride + (task.head * group + row - token * group) * q.head_stride;
    }
    Control::Barriers& barriers = control.queries[n % kQueryStages];
    const std::uint32_t to = shared + Layout<d>::kQueries + n % kQueryStages * Layout<d>::kTileBytes;
    wait(barriers.empty, (n / kQueryStages & 1) ^ 1);
    const T* base = static_cast<const T*>(q.data) + mine.chunk * 8;
    constexpr int kPassesPerRegister = 32 / mine.kRowsPerPass;
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
#pragma unroll 4
      for (int p = 0; p < kPassesPerRegister; ++p) {
        const std::int64_t offset = __shfl_sync(kAllLanes, offsets[i], mine.row_of(p));
        ptx::copy_async(to + mine.offset(i * kPassesPerRegister + p), base + offset);
      }
    }
    ptx::copy_async_wait_all();
    ptx::fence_async_proxy();
    __syncwarp();
    arrive_if(lane == 0, barriers.full);
  }
}

}  // namespace moba::cuda::streaming
