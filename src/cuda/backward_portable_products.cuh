// The products of backward_portable.cu, of one warp, and what stands between and behind them. A product of 16 M rows by
// 8 N columns is float[M][N][4]: lane 4r + c has columns 8x + 2c and + 1 of row 16m + r in [m][x][0], [m][x][1], of row
// 16m + 8 + r in [m][x][2], [m][x][3]. Addresses are those that a lane gives to ldmatrix, at chunks 0 and 1 of the
// operand's first 16 rows; its further rows and columns lie at fixed distances (at_pair).
#pragma once

#include <cstdint>

#include "cuda/attend_portable_tiles.cuh"
#include "cuda/backward_portable_tiles.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"

namespace moba::cuda::portable_backward {

// 16 rows by 16 columns at `to`, for ldmatrix: as operand a, or transposed as operand b (its rows are then the sum's
// index).
__device__ __forceinline__ std::uint32_t lane_by_rows(std::uint32_t to, int row_bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return to + swizzled(row_bytes, lane % 16, lane / 16);
}
// The same with the tiles in another order: as operand b, or transposed as operand a.
__device__ __forceinline__ std::uint32_t lane_by_columns(std::uint32_t to, int row_bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return to + swizzled(row_bytes, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&x)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = 0.0f;
    }
  }
}

// scores = a b^T over the head's columns: rows of a [16 kM, d], rows of b [8 kN, d].
template <class L, int kM, int kN>
__device__ __forceinline__ void score(float (&scores)[kM][kN][4], std::uint32_t a, std::uint32_t b, int head_dim) {
  clear(scores);
#pragma unroll
  for (int i = 0; i < L::kDim / 16; ++i) {
    if (i * 16 == kOptional<L::kDim> && head_dim <= kOptional<L::kDim>) break;
    std::uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::load_matrix_x4(left[m], at_pair(a, i) + m * 16 * L::kRowBytes);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      std::uint32_t right[4];
      ptx::load_matrix_x4(right, at_pair(b, i) + n * 16 * L::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<typename L::T>(scores[m][2 * n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<typename L::T>(scores[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sum += w^T rows: w is P or dS [kRows, 32 keys of them], rows are dout or q [kRows, 16 kPairs columns of them].
template <class L, int kPairs, int kN>
__device__ __forceinline__ void add_to_keys(float (&sum)[2][kN][4], std::uint32_t w, std::uint32_t rows) {
#pragma unroll
  for (int i = 0; i < L::kRows / 16; ++i) {
    std::uint32_t left[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      ptx::load_matrix_x4_transposed(left[m], at_pair(w, m) + i * 16 * L::kWeightBytes);
    }
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      std::uint32_t right[4];
      ptx::load_matrix_x4_transposed(right, at_pair(rows, n) + i * 16 * L::kRowBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::mma_m16n8k16<typename L::T>(sum[m][2 * n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<typename L::T>(sum[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// dq = ds k: ds [32 rows, kKeys], k [kKeys, 32 columns of them].
template <class L>
__device__ __forceinline__ void multiply_keys(float (&dq)[2][4][4], std::uint32_t ds, std::uint32_t k) {
#pragma unroll
  for (int i = 0; i < L::kKeys / 16; ++i) {
    std::uint32_t left[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ptx::load_matrix_x4(left[m], at_pair(ds, i) + m * 16 * L::kWeightBytes);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      std::uint32_t right[4];
      ptx::load_matrix_x4_transposed(right, at_pair(k, n) + i * 16 * L::kRowBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::mma_m16n8k16<typename L::T>(dq[m][2 * n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<typename L::T>(dq[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sum += w b, as the two above, but pair by pair and passing over weights of 0: 0 times an infinity or NaN were NaN.
// weight(i, m, h): of the i-th of `count` rows of b, for the lane's row 16m + 8h of the sum. Chunks of b from
// `first_chunk` on.
template <class L, int kN, class Weight>
__device__ __forceinline__ void add_pairs(float (&sum)[2][kN][4], int count, const void* b, int first_chunk, int chunks,
                                          Weight&& weight) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    float w[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) w[m][h] = weight(i, m, h);
    }
#pragma unroll
    for (int x = 0; x < kN; ++x) {
      if (x >= chunks) break;
      const int place = swizzled(L::kRowBytes, i, first_chunk + x) + static_cast<int>(threadIdx.x) % 4 * 4;
      const float2 pair = ptx::unpack<typename L::T>(
          *reinterpret_cast<const std::uint32_t*>(static_cast<const unsigned char*>(b) + place));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float factor = w[m][e / 2];
          if (factor != 0.0f) sum[m][x][e] += factor * (e % 2 == 0 ? pair.x : pair.y);
        }
      }
    }
  }
}

// One element of P or dS.
template <class L>
__device__ __forceinline__ float weight_at(const unsigned char* weights, int row, int key) {
  const int place = swizzled(L::kWeightBytes, row, key / 8) + key % 8 * 2;
  return static_cast<float>(*reinterpret_cast<const typename L::T*>(weights + place));
}

// Scores become weights exp2(c score - lse), 0 for keys that a row does not see. `row`, `key`: the lane's first.
template <class Shared, int kM, int kN>
__device__ __forceinline__ void weigh(float (&scores)[kM][kN][4], const Shared& shared, int row, int key, float c) {
  int least = shared.limit[row];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float lse = shared.lse[row + 16 * m + 8 * h];
      least = min(least, shared.limit[row + 16 * m + 8 * h]);
#pragma unroll
      for (int x = 0; x < kN; ++x) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) scores[m][x][e] = ptx::exp2_approx(fmaf(scores[m][x][e], c, -lse));
      }
    }
  }
  if (least >= key + 8 * kN) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int x = 0; x < kN; ++x) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int limit = shared.limit[row + 16 * m + e / 2 * 8];
        if (key + 8 * x + e % 2 >= limit) scores[m][x][e] = 0.0f;
      }
    }
  }
}

// dP becomes dS = P (dP - delta), 0 where P is. `finite`: all of dP.
template <class Shared, int kM, int kN>
__device__ __forceinline__ void slope(float (&slopes)[kM][kN][4], const float (&weights)[kM][kN][4],
                                      const Shared& shared, int row, bool finite) {
  float deltas = 0.0f;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float delta = shared.delta[row + 16 * m + 8 * h];
      deltas += delta;
#pragma unroll
      for (int x = 0; x < kN; ++x) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) slopes[m][x][e] = weights[m][x][e] * (slopes[m][x][e] - delta);
      }
    }
  }
  if (finite && isfinite(deltas)) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int x = 0; x < kN; ++x) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (weights[m][x][e] == 0.0f) slopes[m][x][e] = 0.0f;
      }
    }
  }
}

// Not finite if any of the numbers is not.
template <int kM, int kN>
__device__ __forceinline__ float sum_all(const float (&x)[kM][kN][4]) {
  float sum[4] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += x[m][n][e];
    }
  }
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

// Writes weights or slopes, as pairs of keys. `to`: the address of the lane's first pair.
template <class L, int kM, int kN>
__device__ __forceinline__ void store_weights(std::uint32_t to, const float (&x)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        ptx::store_shared((to ^ static_cast<std::uint32_t>(n << 4)) + (16 * m + 8 * h) * L::kWeightBytes,
                          ptx::pack<typename L::T>(x[m][n][2 * h], x[m][n][2 * h + 1]));
      }
    }
  }
}

}  // namespace moba::cuda::portable_backward
