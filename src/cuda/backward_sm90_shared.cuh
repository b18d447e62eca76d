// What the warps of backward_sm90.cu share: shared memory, barriers, registers, arguments.
//
//   0        K, V of unit n in stage n % 2, each in bands of 64 columns [128 keys, 128 bytes]
//   kQ, kDO  Q and dO, tiles in bands [64 rows, 128 bytes]
//   kTerms   the rows' terms (row_terms.cuh), 16 bytes a row, as many tiles as of dO: for one more there is no room.
//            They come with the tile of Q and go with that of dO
//   kWeights of the terms of lse, then of delta: 8 equal rows of 16 bytes each
//   kRing    the units of the two stages
//   kKey...  barriers of the stages of K, V and Unit. full: the producers and the copy engine -> all others;
//            empty: all other threads -> the producers
//   kQ...    of the tiles of Q, kDO... of those of dO. full: the producers -> the key warpgroups;
//            empty: their 8 warps -> the producers
//   kDSFull, kDSEmpty  of dS. full: the 8 warps of the key warpgroups -> the dQ warpgroup; empty: its 4 warps -> them
//   kDS      dS of one tile, 16 bits, in two bands of 64 keys [64 rows, 128 bytes]
#pragma once

#include <cstdint>

#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/resident_keys.cuh"
#include "cuda/row_addresses.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::gradient {

inline constexpr int kTileRows = 64;
inline constexpr int kKeyWarps = 8, kQueryWarps = 4;  // of the key warpgroups, of the dQ warpgroup

// Shared memory in bytes, and who gets the registers: 512 threads start with 128 each and trade.
template <int d>
struct Layout {
  static constexpr int kHeadDim = d, kKeys = kSm90PartKeys;
  static constexpr int kThreads = 512;
  static constexpr int kKeyRegisters = 208, kQueryRegisters = 64, kProducerRegisters = 32;
  static constexpr int kQStages = d == 128 ? 3 : 6, kDOStages = d == 128 ? 2 : 5;
  static constexpr int kTileBytes = kTileRows * d * 2, kTileBand = kTileRows * kBandBytes;
  static constexpr int kKeyBand = kKeys * kBandBytes;
  static constexpr int kKeyBytes = kKeys * d * 2;  // K or V
  static constexpr int kKeyStage = 2 * kKeyBytes;
  static constexpr int kTermBytes = kTileRows * 16;
  static constexpr int kQ = 2 * kKeyStage;
  static constexpr int kDO = kQ + kQStages * kTileBytes;
  static constexpr int kTerms = kDO + kDOStages * kTileBytes;
  static constexpr int kWeights = kTerms + kDOStages * kTermBytes, kWeightBytes = 8 * 16;
  static constexpr int kRing = kWeights + 2 * kWeightBytes;
  static constexpr int kKeyFull = kRing + 2 * static_cast<int>(sizeof(Unit)), kKeyEmpty = kKeyFull + 2 * 8;
  static constexpr int kQFull = kKeyEmpty + 2 * 8, kQEmpty = kQFull + kQStages * 8;
  static constexpr int kDOFull = kQEmpty + kQStages * 8, kDOEmpty = kDOFull + kDOStages * 8;
  static constexpr int kDSFull = kDOEmpty + kDOStages * 8, kDSEmpty = kDSFull + 8;
  // Last, behind 1 KB of what is small: memcheck takes each operand of wgmma_add_terms() for 2 KB that have to exist.
  static constexpr int kDS = kWeights + 1024;
  static constexpr int kBytes = kDS + kTileRows * kKeys * 2;
  static_assert(kDSEmpty + 8 <= kDS && kDS % 1024 == 0 && kBytes <= 227 * 1024);
};

// A stage of a ring of tiles and the parity of its barriers.
template <int kStages>
struct Stage {
  int number = 0, parity;

  __device__ explicit Stage(int first_parity) : parity(first_parity) {}
  __device__ __forceinline__ void next() {
    if (++number == kStages) number = 0, parity ^= 1;
  }
};

struct Arguments {
  KeySource keys;
  const std::int32_t* rows;  // null for dense
  RowAddresses q, dout;
  const uint4* terms;  // RowValues: row i of key head h has those at h * head_terms + i - first_term
  std::int64_t head_terms, first_term;
  std::int64_t no_row;  // where the terms are that rows of no unit read
  char* dq;
  std::int64_t part_stride;
  float* shares;
  View<void> dk, dv;
  KeyTotals totals;
  Divide by_group;
  int group;
  float scale, factor;  // factor: scale * log2 e, scale at least kLeastScale
};

}  // namespace moba::cuda::gradient
