// What the pieces of attend_portable.cu share: how q, k and v stand in shared memory, how they get there, and how a CTA
// comes by its units. backward_portable.cu takes some of it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/contract.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/swizzle.cuh"
#include "cuda/visible_keys.cuh"

namespace moba::cuda::portable {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kTileKeys = 64;

// Columns from here on may all lie behind the head dimension (32 of 64, 96 of 128, 192 of 256), and are then left out.
template <int kDim>
inline constexpr int kOptional = kDim == 64 ? 32 : kDim / 4 * 3;

struct Arguments {
  AttendInput input;
  AttendOutput output;
  UnitList units;
  int head_dim, group;
  float scale_log2e;
  bool tickets;  // units go by ticket; else they are dealt out in turn, so that the next one is known early
};

// kDim >= head_dim; the columns between stay zero.
template <class T, int kDim>
struct Tiles {
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // of 16 rows, for each warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kRowBytes = 2 * kDim;

  struct alignas(128) Shared {
    T q[kRows * kDim], k[kTileKeys * kDim], v[kTileKeys * kDim];
    std::int64_t q_offset[kRows];  // of the next unit's rows, in bytes; 0 behind the last, where any row will do
    int limit[2][kRows];           // keys that a row sees, of this unit and the next
    Unit units[3];                 // this one and those to come; no rows: the end
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

// The address of chunks 2 `pair`, 2 `pair` + 1 of a row, from that of its chunks 0, 1.
__device__ __forceinline__ std::uint32_t at_pair(std::uint32_t address, int pair) {
  return (address ^ static_cast<std::uint32_t>((pair & 3) << 5)) + static_cast<std::uint32_t>((pair >> 2) << 7);
}

// Whether either of two 16-bit numbers is infinite or NaN.
template <class T>
__device__ __forceinline__ bool has_nonfinite(std::uint32_t pair) {
  constexpr std::uint32_t kExponent = std::is_same_v<T, __nv_bfloat16> ? 0x7f80 : 0x7c00;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

// What a thread copies of a tile: one chunk of every kStep-th row.
template <int kDim>
struct Share {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kStep = kThreads / kChunks;
  int chunk = static_cast<int>(threadIdx.x) % kChunks;
  int row = static_cast<int>(threadIdx.x) / kChunks;

  // Where the chunk of row `row` + i kStep stands, from where that of `row` does.
  __device__ static std::uint32_t at_step(std::uint32_t first, int i) {
    return (first ^ static_cast<std::uint32_t>((i * kStep % 8) << 4)) +
           static_cast<std::uint32_t>(i * kStep * 2 * kDim);
  }
};

// One tile of k or v: keys [begin, begin + valid) of a key head, zeros behind them.
template <class T, int kDim>
__device__ __forceinline__ void copy_keys(std::uint32_t to, const View<const void>& view, int head, std::int64_t begin,
                                          int valid, int head_dim) {
  const Share<kDim> share;
  if (share.chunk * 8 >= head_dim) return;
  const T* from = static_cast<const T*>(view.data) + (begin + share.row) * view.token_stride + head * view.head_stride +
                  share.chunk * 8;
  const std::int64_t step = share.kStep * view.token_stride;
  const std::uint32_t first = to + swizzled(2 * kDim, share.row, share.chunk);
  if (valid >= kTileKeys) {
#pragma unroll
    for (int i = 0; i < kTileKeys / share.kStep; ++i, from += step) ptx::copy_async(share.at_step(first, i), from);
  } else {
#pragma unroll
    for (int i = 0; i < kTileKeys / share.kStep; ++i, from += step) {
      ptx::copy_async(share.at_step(first, i), from, share.row + i * share.kStep < valid ? 16 : 0);
    }
  }
}

// The rows of a unit, from their offsets in bytes.
template <class T, int kDim, int kRows>
__device__ __forceinline__ void copy_queries(std::uint32_t to, const void* q, const std::int64_t* offsets,
                                             int head_dim) {
  const Share<kDim> share;
  if (share.chunk * 8 >= head_dim) return;
  const char* data = static_cast<const char*>(q) + share.chunk * 16;
  const std::uint32_t first = to + swizzled(2 * kDim, share.row, share.chunk);
#pragma unroll
  for (int i = 0; i < kRows / share.kStep; ++i) {
    ptx::copy_async(share.at_step(first, i), data + offsets[share.row + i * share.kStep]);
  }
}

// Finds the units of a CTA one after the other, a step at a time behind the computation: the ticket, the unit, its
// rows. The next unit's rows are known when `finish` returns.
template <class T, int kDim>
class Units {
 public:
  using Shared = typename Tiles<T, kDim>::Shared;
  static constexpr int kRows = Tiles<T, kDim>::kRows;

  __device__ Units(const Arguments& arguments, Shared& shared)
      : p_(arguments), s_(shared), count_(arguments.units.counters[1]), step_(arguments.tickets ? 0 : 2) {}

  __device__ const Unit& current() const { return s_.units[turn_ % 3]; }
  __device__ const Unit& next() const { return s_.units[(turn_ + 1) % 3]; }
  __device__ const int* limits() const { return s_.limit[turn_ & 1]; }

  // Makes the first unit the next one, as if there had been one before it.
  __device__ void start() {
    turn_ = -1 + 3;  // the ring and the parity want a number that is not negative
    if (p_.tickets) {
      take_ticket();
    } else {
      ticket_ = static_cast<int>(blockIdx.x);
    }
    fetch_unit(turn_ + 1);
    step_ = 2;
    finish();
  }

  // Every step reads what an earlier one fetched, so copies have to be waited for, and the CTA synchronised, between
  // them.
  __device__ void advance() {
    if (step_ == 0) {
      take_ticket();
    } else if (step_ == 1) {
      fetch_unit(turn_ + 1);
    } else if (step_ == 2) {
      const Unit& unit = next();
      const int i = static_cast<int>(threadIdx.x);
      if (i < unit.rows) row_ = p_.input.rows != nullptr ? p_.input.rows[unit.first + i] : unit.row0 + i;
      if (!p_.tickets) {
        ticket_ = unit.rows > 0 ? ticket_ + static_cast<int>(gridDim.x) : count_;
        fetch_unit(turn_ + 2);
      }
    } else {
      return;
    }
    ++step_;
  }

  // Takes the steps that are left and writes down the next unit's rows; visible after the next synchronisation.
  __device__ void finish() {
    while (step_ < 3) {
      ptx::copy_async_wait_all();
      __syncthreads();
      advance();
    }
    const Unit& unit = next();
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kRows || unit.rows == 0) return;
    std::int64_t offset = 0;
    int limit = unit.keys;
    if (i < unit.rows) {
      const int token = row_ / p_.group;
      const int head = unit.head * p_.group + row_ - token * p_.group;
      offset = 2 * (token * p_.input.q.token_stride + head * p_.input.q.head_stride);
      if (i < unit.masked) limit = keys_up_to(unit, token);
    }
    s_.q_offset[i] = offset;
    s_.limit[(turn_ + 1) & 1][i] = limit;
  }

  __device__ void turn() {
    ++turn_;
    if (turn_ == 12) turn_ = 6;
    step_ = p_.tickets ? 0 : 2;
  }

 private:
  __device__ void take_ticket() {
    if (threadIdx.x == 0) ticket_ = atomicAdd(p_.units.counters, 1);
  }

  __device__ void fetch_unit(int turn) {
    if (threadIdx.x != 0) return;
    Unit& to = s_.units[turn % 3];
    if (ticket_ >= count_) {
      to.rows = 0;
      return;
    }
    const char* from = reinterpret_cast<const char*>(p_.units.units + ticket_);
    const std::uint32_t address = ptx::shared_address(&to);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Unit) / 16); ++i) ptx::copy_async(address + 16 * i, from + 16 * i);
  }

  const Arguments& p_;
  Shared& s_;
  int count_;
  int step_;        // 0: take a ticket, 1: fetch the unit, 2: fetch its rows, 3: done
  int turn_ = 0;    // of the unit computed on, kept small
  int ticket_ = 0;  // thread 0, or all threads where units are dealt out in turn
  int row_ = 0;     // of the next unit, number threadIdx.x
};

}  // namespace moba::cuda::portable
