// backward for every device from sm_80 on, by mma.sync, ldmatrix and cp.async.
//
// A CTA of four warps takes one unit at a time. The unit's keys and values [part, d] stay in shared memory, its rows of
// q and dout are gathered a tile [64 or 32, d] at a time:
//
//   S = Q K^T    P = exp2(c S - lse)    dP = dO V^T    dS = P (dP - delta)
//   dV += P^T dO    dK += dS^T Q    dQ = dS K
//
// P and dS pass through shared memory, 16 bits a number, so that a warp can have another piece of each product (Tiles):
// 32 by 32 of S and dP, 32 keys by 64 columns of dV and dK, which stay in registers to the end of the unit, 32 rows by
// 32 columns of dQ. The larger the piece, the fewer bytes of shared memory an mma.sync costs: 256 for S, dP and dQ, 192
// for dV and dK, where an SM of sm_80 delivers 256 in the time of one. A row of dQ is final for the unit and goes to
// its place in the partials; nothing is added by atomics.
//
// Barriers of a tile: its operands are there | P and dS are there | q and dout are free, and those of the next tile
// (often the next unit's, whose ticket is taken with the first tile) are on their way while dQ is computed. Two CTAs
// share an SM where its memory allows, so that one computes while the other waits.
//
// In shared memory a row of q, k, v or dout is 2 d bytes, one of P or dS 2 keys (at least 128), swizzled (swizzle.cuh).
//
// A pair of weight 0 takes no part, even if something in it is infinite or NaN, which 0 times it would not silence. S
// and dP tell: those of a row or key that is not finite are not finite either. Such a tile is multiplied pair by pair.
#include <numbers>

#include "cuda/backward_portable_products.cuh"
#include "cuda/backward_portable_tiles.cuh"
#include "cuda/contract.h"
#include "cuda/launch.h"

namespace moba::cuda {
namespace {

using namespace portable_backward;

constexpr int kCtasPerSm = 2;

__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % 32; }

// Writes P and dS of the tile to shared memory. Returns whether all that they come from is finite.
template <class L>
__device__ __forceinline__ bool compute_weights(const Arguments& p, typename L::Shared& shared) {
  using T = typename L::T;
  const int first_key = warp_of() % L::kScoreKeyGroups * L::kScoreKeys;
  const int key = first_key + lane_of() % 4 * 2;
  const std::uint32_t k = lane_by_columns(ptx::shared_address(shared.k + first_key * L::kDim), L::kRowBytes);
  const std::uint32_t v = lane_by_columns(ptx::shared_address(shared.v + first_key * L::kDim), L::kRowBytes);
  bool finite = true;
#pragma unroll 1
  for (int i = 0; i < L::kWarpRows; i += L::kScoreRows) {
    const int first_row = warp_of() / L::kScoreKeyGroups * L::kWarpRows + i;
    const int row = first_row + lane_of() / 4;
    const int place = swizzled(L::kWeightBytes, row, first_key / 8) + lane_of() % 4 * 4;
    float weights[L::kScoreRows / 16][L::kScoreKeys / 8][4], slopes[L::kScoreRows / 16][L::kScoreKeys / 8][4];
    const T* q = shared.q + first_row * L::kDim;
    score<L>(weights, lane_by_rows(ptx::shared_address(q), L::kRowBytes), k, p.head_dim);
    float all = sum_all(weights);
    weigh(weights, shared, row, key, p.scale_log2e);
    store_weights<L>(ptx::shared_address(shared.p) + place, weights);
    const T* dout = shared.dout + first_row * L::kDim;
    score<L>(slopes, lane_by_rows(ptx::shared_address(dout), L::kRowBytes), v, p.head_dim);
    all += sum_all(slopes);
    const bool these_finite = isfinite(all);
    slope(slopes, weights, shared, row, these_finite);
    store_weights<L>(ptx::shared_address(shared.ds) + place, slopes);
    finite = finite && these_finite;
  }
  return finite;
}

// dk and dv of the unit: those of 32 keys and kColumns columns in each warp.
template <class L>
class KeySums {
 public:
  using T = typename L::T;
  using Shared = typename L::Shared;

  __device__ explicit KeySums(int head_dim)
      : first_key_(warp_of() % L::kKeyGroups * 32),
        first_column_(warp_of() / L::kKeyGroups * L::kColumns),
        columns_(min(L::kColumns, head_dim - first_column_)) {}

  __device__ __forceinline__ void reset() {
    clear(dk_);
    clear(dv_);
  }

  // The sums over the tile's rows.
  __device__ __forceinline__ void add(const Shared& shared) {
    if (columns_ == L::kColumns) {
      add_columns<L::kColumns / 16>(shared);
    } else if (columns_ > 0) {
      add_columns<2>(shared);
    }
  }
  __device__ __forceinline__ void add_by_pairs(const Shared& shared) {
    const int key = first_key_ + lane_of() / 4;
    const auto weight = [key](const unsigned char* weights) {
      return [=](int row, int m, int h) { return weight_at<L>(weights, row, key + 16 * m + 8 * h); };
    };
    add_pairs<L>(dv_, L::kRows, shared.dout, first_column_ / 8, columns_ / 8, weight(shared.p));
    add_pairs<L>(dk_, L::kRows, shared.q, first_column_ / 8, columns_ / 8, weight(shared.ds));
  }

  __device__ __forceinline__ void store(const Arguments& p, const Unit& unit) const {
    if (unit.share >= 0) {
      const std::int64_t floats = std::int64_t{L::kKeys} * p.head_dim;
      float* share = p.output.shares + 2 * floats * unit.share;
      store_floats(share, unit, p.head_dim, p.scale, dk_, false);
      store_floats(share + floats, unit, p.head_dim, 1.0f, dv_, false);
    } else if (p.output.totals.dk != nullptr) {
      const std::int64_t first = static_cast<std::int64_t>(unit.key_begin) * p.head_dim;
      store_floats(p.output.totals.dk + first, unit, p.head_dim, p.scale, dk_, true);
      store_floats(p.output.totals.dv + first, unit, p.head_dim, 1.0f, dv_, true);
    } else {
      store_final(p.output.dk, unit, p.scale, dk_);
      store_final(p.output.dv, unit, 1.0f, dv_);
    }
  }

 private:
  using Sum = float[2][L::kColumns / 8][4];

  template <int kPairs>
  __device__ __forceinline__ void add_columns(const Shared& shared) {
    const auto weights = [this](const unsigned char* w) {
      return at_pair(lane_by_columns(ptx::shared_address(w), L::kWeightBytes), first_key_ / 16);
    };
    const auto rows = [this](const T* x) {
      return at_pair(lane_by_rows(ptx::shared_address(x), L::kRowBytes), first_column_ / 16);
    };
    add_to_keys<L, kPairs>(dv_, weights(shared.p), rows(shared.dout));
    add_to_keys<L, kPairs>(dk_, weights(shared.ds), rows(shared.q));
  }

  __device__ __forceinline__ void store_final(const View<void>& view, const Unit& unit, float factor,
                                              const Sum& sum) const {
    T* column = static_cast<T*>(view.data) + unit.head * view.head_stride + first_column_ + lane_of() % 4 * 8;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = first_key_ + lane_of() / 4 + 16 * m + 8 * h;
        T* to = column + (std::int64_t{unit.key_begin} + key) * view.token_stride;
#pragma unroll
        for (int x = 0; x < L::kColumns / 8; x += 4) {
          std::uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = ptx::pack<T>(sum[m][x + i][2 * h] * factor, sum[m][x + i][2 * h + 1] * factor);
          }
          quad_transpose(words, lane_of());
          if (key < unit.keys && 8 * x < columns_) {
            *reinterpret_cast<uint4*>(to + 8 * x) = make_uint4(words[0], words[1], words[2], words[3]);
          }
        }
      }
    }
  }

  // `adds`: to what is there.
  __device__ __forceinline__ void store_floats(float* keys, const Unit& unit, int head_dim, float factor,
                                               const Sum& sum, bool adds) const {
    float* column = keys + first_column_ + lane_of() % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = first_key_ + lane_of() / 4 + 16 * m + 8 * h;
        if (key >= unit.keys) continue;
#pragma unroll
        for (int x = 0; x < L::kColumns / 8; ++x) {
          if (x % 4 == 0 && 8 * x >= columns_) break;
          float2* place = reinterpret_cast<float2*>(column + key * head_dim + 8 * x);
          const float2 before = adds ? *place : make_float2(0, 0);
          *place = make_float2(before.x + sum[m][x][2 * h] * factor, before.y + sum[m][x][2 * h + 1] * factor);
        }
      }
    }
  }

  int first_key_, first_column_, columns_;
  Sum dk_, dv_;
};

// Columns [32 chunk, 32 chunk + 32) of the lane's rows of dq, from number `row` of the unit on.
template <class T>
__device__ __forceinline__ void store_dq(const Arguments& p, const Unit& unit, int row, int chunk,
                                         const float (&dq)[2][4][4]) {
  T* to = static_cast<T*>(p.output.dq) + (unit.part * p.output.part_stride + unit.first + row) * p.head_dim +
          chunk * 32 + lane_of() % 4 * 8;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 16 * m + 8 * h >= unit.rows) continue;
      std::uint32_t words[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) words[x] = ptx::pack<T>(dq[m][x][2 * h] * p.scale, dq[m][x][2 * h + 1] * p.scale);
      __stcs(reinterpret_cast<uint4*>(to + (16 * m + 8 * h) * p.head_dim),
             make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// dq of the tile's rows, numbers begin, begin + 1, ... of the unit.
template <class L>
__device__ __forceinline__ void compute_dq(const Arguments& p, const typename L::Shared& shared, const Unit& unit,
                                           int begin, bool finite) {
  const int first_row = warp_of() % L::kRowGroups * 32;
  const int row = first_row + lane_of() / 4;
  const std::uint32_t ds = lane_by_rows(ptx::shared_address(shared.ds + first_row * L::kWeightBytes), L::kWeightBytes);
  const std::uint32_t k = lane_by_rows(ptx::shared_address(shared.k), L::kRowBytes);
#pragma unroll 1
  for (int chunk = warp_of() / L::kRowGroups; chunk * 32 < p.head_dim; chunk += kWarps / L::kRowGroups) {
    float dq[2][4][4];
    clear(dq);
    if (finite) {
      multiply_keys<L>(dq, ds, at_pair(k, 2 * chunk));
    } else {
      add_pairs<L>(dq, L::kKeys, shared.k, 4 * chunk, 4,
                   [&](int key, int m, int h) { return weight_at<L>(shared.ds, row + 16 * m + 8 * h, key); });
    }
    store_dq<typename L::T>(p, unit, begin + row, chunk, dq);
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) backward_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename L::Shared*>(shared_bytes);
  const auto copy_keys = [&](const Unit& unit) {
    copy_part<L>(ptx::shared_address(shared.k), p.input.k, unit, p.head_dim);
  };
  const auto copy_values = [&](const Unit& unit) {
    copy_part<L>(ptx::shared_address(shared.v), p.input.v, unit, p.head_dim);
  };
  NextRows<L> rows(p, shared);
  const auto load_rows = [&](const Unit& unit, int begin) {
    rows.copy(unit, begin);
    rows.load_values(unit, begin);
  };

  Units units(p.units, shared.units);
  units.take();
  units.fetch();
  ptx::copy_async_wait_all();
  __syncthreads();
  units.turn();
  if (units.current().rows == 0) return;
  copy_keys(units.current());
  copy_values(units.current());
  rows.find(units.current(), 0);
  load_rows(units.current(), 0);

  KeySums<L> sums(p.head_dim);
  for (; units.current().rows > 0; units.turn()) {
    const Unit& unit = units.current();
    sums.reset();
    for (int begin = 0; begin < unit.rows; begin += L::kRows) {
      const bool first = begin == 0, last = begin + L::kRows >= unit.rows;
      rows.store_values();
      ptx::copy_async_wait_all();
      __syncthreads();  // the operands are there
      if (first) units.take();
      if (!last) {
        rows.find(unit, begin + L::kRows);
      } else if (!first && units.next().rows > 0) {
        rows.find(units.next(), 0);
      }
      const bool own_finite = compute_weights<L>(p, shared);
      const bool finite = __syncthreads_and(own_finite) != 0;  // P and dS are there
      if (first) units.fetch();
      if (finite) {
        sums.add(shared);
      } else {
        sums.add_by_pairs(shared);
      }
      if (first) ptx::copy_async_wait_all();
      __syncthreads();  // q, dout and, behind the last tile, v are free; the next unit is there
      if (!last || units.next().rows > 0) {
        const Unit& coming = last ? units.next() : unit;
        if (first && last) rows.find(coming, 0);
        load_rows(coming, last ? 0 : begin + L::kRows);
        if (last) copy_values(coming);
      }
      compute_dq<L>(p, shared, unit, begin, finite);
    }
    __syncthreads();  // k is free
    if (units.next().rows > 0) copy_keys(units.next());
    sums.store(p, unit);
  }
}

template <class T, int kDim, int kKeys>
void launch_backward(const Shape& shape, const Arguments& arguments, cudaStream_t stream) {
  using L = Tiles<T, kDim, kKeys>;
  launch(backward_kernel<L>, dim3(static_cast<unsigned>(shape.sm_count * kCtasPerSm)), kThreads,
         sizeof(typename L::Shared), stream, arguments);
}

template <class T>
void launch_backward(const Shape& shape, const Arguments& arguments, cudaStream_t stream) {
  if (shape.head_dim <= 64 && arguments.output.part_keys == 64) {
    launch_backward<T, 64, 64>(shape, arguments, stream);
  } else if (shape.head_dim <= 64) {
    launch_backward<T, 64, 128>(shape, arguments, stream);
  } else if (shape.head_dim <= 128) {
    launch_backward<T, 128, 64>(shape, arguments, stream);
  } else {
    launch_backward<T, 256, 32>(shape, arguments, stream);
  }
}

}  // namespace

int portable_part_keys(int head_dim) { return head_dim <= 64 ? 128 : head_dim <= 128 ? 64 : 32; }

void backward_portable(const Shape& shape, Slab slab, const BackwardInput& input, const UnitList& units,
                       const BackwardOutput& output, cudaStream_t stream) {
  if (shape.total_q == 0 || shape.total_k == 0) return;
  const Arguments arguments{.input = input,
                            .output = output,
                            .units = units,
                            .slab = slab,
                            .head_dim = shape.head_dim,
                            .group = shape.group,
                            .scale = shape.scale,
                            .scale_log2e = static_cast<float>(shape.scale * std::numbers::log2e),
                            .by_group = Divide(shape.group)};
  if (shape.dtype == DType::bf16) {
    launch_backward<__nv_bfloat16>(shape, arguments, stream);
  } else {
    launch_backward<__half>(shape, arguments, stream);
  }
}

}  // namespace moba::cuda
