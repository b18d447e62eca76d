// The part of attend_portable.cu that lives in registers: scores, online softmax and outputs of a warp's rows.
#pragma once

#include <cmath>
#include <numbers>

#include "cuda/attend_portable_tiles.cuh"
#include "cuda/lanes.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"

namespace moba::cuda::portable {

// Exponents beyond it are made from differences of raw scores: the rounding of max * c, a factor on all of the row's
// weights, would grow too large for f16.
inline constexpr float kLargeExponent = 4096.0f;

// The rows of one warp: scores of a tile, running maximum and sum, outputs. Lane 4r + c holds columns 8x + 2c, + 1 of
// rows r and r + 8 of each 16.
template <class T, int kDim>
struct WarpRows {
  using Layout = Tiles<T, kDim>;
  static constexpr int kRowTiles = Layout::kRowTiles;
  static constexpr int kRowBytes = Layout::kRowBytes;

  float scores[kRowTiles][kTileKeys / 8][4];
  float out[kRowTiles][kDim / 8][4];
  float maximum[kRowTiles][2];
  float sum[kRowTiles][2];  // of this lane's columns

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int x = 0; x < kDim / 8; ++x) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][x][e] = 0.0f;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        maximum[m][h] = -INFINITY;
        sum[m][h] = 0.0f;
      }
    }
  }

  // scores = q k^T. q and k: this lane's ldmatrix addresses of chunks 0 and 1.
  __device__ __forceinline__ void score(std::uint32_t q, std::uint32_t k, int head_dim) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int x = 0; x < kTileKeys / 8; ++x) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][x][e] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      if (i * 16 == kOptional<kDim> && head_dim <= kOptional<kDim>) break;
      std::uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ptx::load_matrix_x4(a[m], at_pair(q, i) + m * 16 * kRowBytes);
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        std::uint32_t b[4];
        ptx::load_matrix_x4(b, at_pair(k, i) + n * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k16<T>(scores[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Scores of keys that a row does not see become -inf. `begin` is the tile's first key, `limits` are those of this
  // lane's rows: of row 16m + 8h, at 16m + 8h.
  __device__ __forceinline__ void mask(const int* limits, int begin) {
    const int column = begin + 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int limit[2] = {limits[16 * m] - column, limits[16 * m + 8] - column};
#pragma unroll
      for (int x = 0; x < kTileKeys / 8; ++x) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * x + e % 2 >= limit[e / 2]) scores[m][x][e] = -INFINITY;
        }
      }
    }
  }

  // Scale 0: every score that is a number counts as 0. Comes before the mask.
  __device__ __forceinline__ void cancel_scores() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int x = 0; x < kTileKeys / 8; ++x) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][x][e] *= 0.0f;
      }
    }
  }

  // Turns scores into weights exp2(c (score - maximum)) and brings sums and outputs to the new maximum. c > 0.
  __device__ __forceinline__ void weigh(float c) {
    float shift[kRowTiles][2], factor[kRowTiles][2];
    bool large = false, changed = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = maximum[m][h];
#pragma unroll
        for (int x = 0; x < kTileKeys / 8; ++x) top = fmaxf(top, fmaxf(scores[m][x][2 * h], scores[m][x][2 * h + 1]));
        top = quad_max(top);
        const float base = top == -INFINITY ? 0.0f : top;  // nothing seen yet: weights 0, not NaN
        const bool moved = maximum[m][h] != top && maximum[m][h] != -INFINITY;
        factor[m][h] = moved ? ptx::exp2_approx((maximum[m][h] - base) * c) : 1.0f;
        changed |= moved;
        maximum[m][h] = top;
        shift[m][h] = base * c;
        large |= fabsf(shift[m][h]) > kLargeExponent;
      }
    }
    // With the first tile, and often with later ones, there is nothing to bring to another maximum. The votes only
    // spare work: what becomes of a row depends on nothing but the row.
    if (__any_sync(kAllLanes, changed)) rescale(factor);
    if (__any_sync(kAllLanes, large)) subtract_large(shift);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int x = 0; x < kTileKeys / 8; ++x) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[m][x][e] = ptx::exp2_approx(fmaf(scores[m][x][e], c, -shift[m][e / 2]));
          sum[m][e / 2] += scores[m][x][e];
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] *= factor[m][h];
#pragma unroll
        for (int x = 0; x < kDim / 8; ++x) {
          out[m][x][2 * h] *= factor[m][h];
          out[m][x][2 * h + 1] *= factor[m][h];
        }
      }
    }
  }

  // Where the shift is large, it is taken out of the scores themselves.
  __device__ __forceinline__ void subtract_large(float (&shift)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool large = fabsf(shift[m][h]) > kLargeExponent;
        const float base = large ? maximum[m][h] : 0.0f;
        shift[m][h] = large ? 0.0f : shift[m][h];
#pragma unroll
        for (int x = 0; x < kTileKeys / 8; ++x) {
          scores[m][x][2 * h] -= base;
          scores[m][x][2 * h + 1] -= base;
        }
      }
    }
  }

  // out += weights v. v: this lane's ldmatrix address of chunks 0 and 1.
  __device__ __forceinline__ void add_values(std::uint32_t v, int head_dim) {
    std::uint32_t weights[kTileKeys / 16][kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kTileKeys / 16; ++i) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float(&pair)[4] = scores[m][2 * i + e / 2];
          weights[i][m][e] = ptx::pack<T>(pair[e % 2 * 2], pair[e % 2 * 2 + 1]);
        }
      }
    }
    add_columns<0, kOptional<kDim> / 16>(weights, v);
    if (head_dim > kOptional<kDim>) add_columns<kOptional<kDim> / 16, kDim / 16>(weights, v);
  }

  // Adds the infinite and NaN elements of v's rows [from, to) to the rows that see them, whatever their weight.
  __device__ __forceinline__ void add_nonfinite(const T* v, const int* limits, int begin, int from, int to) {
    const int c = static_cast<int>(threadIdx.x) % 4;
    for (int row = from; row < to; ++row) {
#pragma unroll
      for (int x = 0; x < kDim / 8; ++x) {
        const auto place = swizzled(kRowBytes, row, x) + 4 * c;
        const auto pair = *reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const char*>(v) + place);
        if (!has_nonfinite<T>(pair)) continue;
        const float2 values = ptx::unpack<T>(pair);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (limits[16 * m + 8 * h] <= begin + row) continue;
            if (!isfinite(values.x)) out[m][x][2 * h] += values.x;
            if (!isfinite(values.y)) out[m][x][2 * h + 1] += values.y;
          }
        }
      }
    }
  }

  // Writes the rows of the unit that are this warp's, from `first_row` on.
  __device__ __forceinline__ void store(const Arguments& p, const Unit& unit, int first_row, float c) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float total = quad_sum(sum[m][h]);
        const bool empty = total == 0.0f;
        const float factor = 1.0f / total;
#pragma unroll
        for (int x = 0; x < kDim / 8; ++x) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) out[m][x][e] = empty ? 0.0f : out[m][x][e] * factor;
        }
        const float base = maximum[m][h] == -INFINITY ? 0.0f : maximum[m][h];
        const float lse = empty ? -INFINITY : fmaf(base, c, ptx::log2_approx(total));
        const int row = first_row + 16 * m + 8 * h + lane / 4;
        if (row >= unit.rows) continue;
        if (p.output.partials.out != nullptr) {
          store_partial(p, unit.first + row, m, h, lse);
        } else {
          store_final(p, unit, unit.row0 + row, m, h, lse);
        }
      }
    }
  }

 private:
  // Columns [16 kFrom, 16 kTo).
  template <int kFrom, int kTo>
  __device__ __forceinline__ void add_columns(const std::uint32_t (&weights)[kTileKeys / 16][kRowTiles][4],
                                              std::uint32_t v) {
#pragma unroll
    for (int i = 0; i < kTileKeys / 16; ++i) {
#pragma unroll
      for (int n = kFrom; n < kTo; ++n) {
        std::uint32_t b[4];
        ptx::load_matrix_x4_transposed(b, at_pair(v, n) + i * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k16<T>(out[m][2 * n], weights[i][m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(out[m][2 * n + 1], weights[i][m], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_partial(const Arguments& p, std::int64_t entry, int m, int h, float lse) const {
    const int c = static_cast<int>(threadIdx.x) % 4;
    T* to = static_cast<T*>(p.output.partials.out) + entry * p.head_dim + 8 * c;
#pragma unroll
    for (int x = 0; x < kDim / 8; x += 4) {
      if (8 * x == kOptional<kDim> && p.head_dim <= kOptional<kDim>) break;
      uint4 chunk;
      chunk.x = ptx::pack<T>(out[m][x][2 * h], out[m][x][2 * h + 1]);
      chunk.y = ptx::pack<T>(out[m][x + 1][2 * h], out[m][x + 1][2 * h + 1]);
      chunk.z = ptx::pack<T>(out[m][x + 2][2 * h], out[m][x + 2][2 * h + 1]);
      chunk.w = ptx::pack<T>(out[m][x + 3][2 * h], out[m][x + 3][2 * h + 1]);
      *reinterpret_cast<uint4*>(to + 8 * x) = chunk;
    }
    if (c == 0) p.output.partials.lse[entry] = lse;
  }

  __device__ __forceinline__ void store_final(const Arguments& p, const Unit& unit, int row, int m, int h,
                                              float lse) const {
    const int c = static_cast<int>(threadIdx.x) % 4;
    const int token = row / p.group;
    const int head = unit.head * p.group + row - token * p.group;
    T* to = static_cast<T*>(p.output.out.data) + token * p.output.out.token_stride + head * p.output.out.head_stride;
#pragma unroll
    for (int x = 0; x < kDim / 8; ++x) {
      if (8 * x == kOptional<kDim> && p.head_dim <= kOptional<kDim>) break;
      *reinterpret_cast<std::uint32_t*>(to + 8 * x + 2 * c) = ptx::pack<T>(out[m][x][2 * h], out[m][x][2 * h + 1]);
    }
    if (c == 0 && p.output.lse.data != nullptr) {
      p.output.lse.data[head * p.output.lse.head_stride + token * p.output.lse.token_stride] =
          lse * std::numbers::ln2_v<float>;
    }
  }
};

}  // namespace moba::cuda::portable
