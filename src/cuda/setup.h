// What a plan of the cuda backend settles: kernels, slabs, and how the workspace is divided. Pure: it looks at the
// problem and at the limits of a device, and calls nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "carver.h"
#include "cuda/contract.h"
#include "cuda/device.h"
#include "plan_impl.h"

namespace moba::cuda {

inline constexpr std::int64_t kTokenStep = 128;  // slabs of part of the tokens are cut at multiples of this

enum class GateKernel : std::uint8_t { sm90, portable };
enum class AttendKernel : std::uint8_t {
  resident_sm90,  // a block of at most 128 keys stays in shared memory, many rows pass by
  stream_sm90,    // 128 rows stay, the keys pass by
  portable,
};

enum class BackwardKernel : std::uint8_t { sm90, portable };

// How backward, or dense_backward, cuts its work: a slab of rows against some parts of every block at a time.
struct BackwardSetup {
  bool dense = false;
  int part_keys = 64;
  int last_most_rows = 2048;            // bound of Sections::last_most_rows
  int all_parts = 1, parts = 1;         // of the longest block (dense: sequence); at a time
  int slab_heads = 1, slab_tokens = 1;  // largest slab
  Sections sections;

  // The most that is done at a time.
  Slab slab() const { return {0, slab_heads, 0, slab_tokens}; }
  Pass pass() const { return {sections, part_keys, 0, parts}; }
  // Whether dk and dv are summed up over several slabs.
  bool sums_keys(const Shape& shape) const { return slab_tokens < shape.total_q; }
};

struct Setup {
  DeviceLimits device;
  Shape shape;
  GateKernel gate = GateKernel::portable;
  AttendKernel attend = AttendKernel::portable, dense = AttendKernel::portable;
  int rows_per_unit = 64, dense_rows_per_unit = 64;
  int slab_heads = 1, slab_tokens = 1;  // largest slab of forward and attend
  int index_heads = 1;                  // key heads at a time of the public index(), all tokens; 0: refused
  BackwardKernel backward = BackwardKernel::portable;
  BackwardSetup chosen_backward, dense_backward;
  int rope_pairs = 0;  // whose cosines and sines are computed, not looked up in the caller's table
};

// Fills plan.cuda, scratch_bytes, backward_scratch_bytes and selection_bytes, or refuses the problem or the options.
void prepare(Plan::Impl& plan, const DeviceLimits& device);

// The part of that which is about backward (backward_setup.cc); returns the scratch it takes, at most `limit` if it
// can.
std::size_t prepare_backward(Setup& setup, const Plan::Impl& plan, std::size_t limit);

// The largest n in [1, most] with fits(n), which holds for all smaller n too; 0 if there is none.
template <class Fits>
std::int64_t largest(std::int64_t most, Fits fits) {
  std::int64_t good = 0, bad = most + 1;
  while (bad - good > 1) {
    const std::int64_t middle = good + (bad - good) / 2;
    (fits(middle) ? good : bad) = middle;
  }
  return good;
}

// ---- The scratch memory of a call, by what it computes. ----

struct BatchMemory {
  DeviceSequence* sequences;
  DeviceBlock* blocks;

  BatchMemory(Carver& carver, const Shape& shape);
};

struct RopeMemory {
  double2* steps;

  RopeMemory(Carver& carver, const Setup& setup);
};

// forward and attend: a slab's ids (attend reads the caller's), their transpose, units, partial results.
struct SlabMemory {
  std::int32_t* ids;  // [heads][tokens][group][slots]
  Index index;
  void* index_scratch;
  UnitList units;
  Partials partials;

  SlabMemory(Carver& carver, const Setup& setup, Slab slab);
};

struct DenseMemory {
  UnitList units;

  DenseMemory(Carver& carver, const Setup& setup);
};

// backward: a slab's lists (not dense), units, values of rows, partials of dq, and sums.
struct BackwardMemory {
  Index index{};
  void* index_scratch = nullptr;
  UnitList units;
  ShareList share_list;
  float* shares;
  RowValues values;
  void* dq;
  std::int64_t part_stride;
  float* query_totals = nullptr;  // where there are several passes
  KeyTotals key_totals{};         // where there are several slabs of tokens

  BackwardMemory(Carver& carver, const Setup& setup, const BackwardSetup& backward);
};

struct IndexMemory {
  void* scratch;

  IndexMemory(Carver& carver, const Shape& shape, Slab slab);
};

}  // namespace moba::cuda
