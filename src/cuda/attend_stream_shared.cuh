// What the warps of attend_stream_sm90.cu share: shared memory (Layout), barriers (Control), the units at work (Task).
//
//   0          q of unit n in stage n % 2, [128 rows, d] in halves of 64 columns
//   kKeys      k in kKeyStages tiles [128 keys, d], the same
//   kValues    v in kValueStages tiles, the same
//   kControl   Control: barriers and units
//
// full: the one warp that fills a stage -> the consumers; empty: each of the 8 consumer warps -> that warp. For a unit
// (tasks) empty counts the loaders of q, k and v too, which read it as the consumers do.
#pragma once

#include <cstdint>

#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::streaming {

constexpr int kRows = 128;  // of a unit
constexpr int kTileKeys = 128;
constexpr int kConsumers = 2;  // warpgroups of 64 rows
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
constexpr int kHalfBytes = kRows * kBandBytes;  // 128 rows or keys of 64 columns
constexpr int kTasks = 8;                       // units known at once
constexpr int kQueryStages = 2;
constexpr float kInfinity = __builtin_huge_valf();

// A unit at work. keys: no more than what the last row sees; common: keys that all rows see; rows = 0: no more units.
struct alignas(16) Task {
  std::int64_t first;
  int head, key_begin, keys, rows, first_token, masked, row0, common;

  __device__ int tiles() const { return (keys + kTileKeys - 1) / kTileKeys; }
  __device__ bool mixed(int tile) const { return (tile + 1) * kTileKeys > common; }
};

// Shared memory: q 2 stages, k, v, each stage in halves of 64 columns; then Control. 225 KB for d = 128.
template <int d>
struct Layout {
  static constexpr int kTileBytes = d / 64 * kHalfBytes;
  static constexpr int kKeyStages = d == 128 ? 2 : 4;
  static constexpr int kValueStages = d == 128 ? 3 : 4;  // a mixed tile of v takes its loader a while
  static constexpr int kQueries = 0;
  static constexpr int kKeys = kQueries + kQueryStages * kTileBytes;
  static constexpr int kValues = kKeys + kKeyStages * kTileBytes;
  static constexpr int kControl = kValues + kValueStages * kTileBytes;
  // The next unit is taken when fewer tiles than this are left to load: early enough for its ticket, its description,
  // its row ids and its rows to arrive one after the other (4 to 5 us), late, so that the last units spread evenly.
  static constexpr int kTilesAhead = d == 128 ? 6 : 10;
};

struct Control {
  struct Barriers {
    std::uint64_t full, empty;
  };
  Barriers queries[kQueryStages], keys[4], values[4], tasks[kTasks];
  int non_finite[4];  // of the stages of v: the tile had such values
  int tiles_loaded;   // of k; tells when to take the next unit, orders nothing
  Task tasks_of[kTasks];
};

template <int d>
constexpr std::size_t kSharedBytes = Layout<d>::kControl + sizeof(Control);

struct Arguments {
  AttendInput input;
  UnitList units;
  AttendOutput output;
  int group;
  Divide by_group;
  float scale;  // with log2(e) in it, above 0
};

// A stage of a ring of buffers and the parity of its barriers.
template <int stages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void wait(const std::uint64_t& barrier, int parity) {
  ptx::barrier_wait(ptx::shared_address(&barrier), parity);
}
__device__ __forceinline__ void arrive_if(bool condition, const std::uint64_t& barrier) {
  ptx::barrier_arrive_if(condition, ptx::shared_address(&barrier));
}
__device__ __forceinline__ const Task& wait_task(const Control& control, int n) {
  wait(control.tasks[n % kTasks].full, n / kTasks & 1);
  return control.tasks_of[n % kTasks];
}

}  // namespace moba::cuda::streaming
