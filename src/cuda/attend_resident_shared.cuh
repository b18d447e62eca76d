// What the warps of attend_resident_sm90.cu share: shared memory, barriers, registers, arguments.
//
//   0        K, V of unit n in stage n % 2, each in bands of 64 columns [kKeys, 128 bytes]
//   kQ       Q in kQStages tiles, each in bands [64, 128 bytes]
//   kRing    the units of the two stages
//   kKey...  barriers of the stages of K, V and Unit. full: the producers and the copy engine -> the consumers;
//            empty: each consumer thread, done with the last tile of its own -> the producers
//   kQ...    barriers of the tiles. full: the producers -> the warpgroup that the tile is for; empty: its 4 warps
//
// Every consumer takes part in every unit: a unit counts at least as many tiles as there are consumers, the last may be
// empty.
#pragma once

#include <cstdint>

#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/resident_keys.cuh"
#include "cuda/row_addresses.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda::resident {

inline constexpr int kTileRows = 64;

// Shared memory in bytes, and who gets the registers: (consumers + 1) * 128 threads start with an equal share of 64K
// and trade. A fourth consumer leaves 112 to each, without spills only for d = 64 with 64 keys.
template <int d, int kStageKeys>
struct Layout {
  static constexpr int kHeadDim = d, kKeys = kStageKeys;
  static constexpr int kConsumers = d == 64 && kKeys == 64 ? 4 : 3;  // warpgroups
  static constexpr bool kTight = d == 128 && kKeys == 128;           // S, O take 128 registers
  static constexpr int kConsumerRegisters = kTight ? 160 : kConsumers == 3 ? 152 : 104;
  static constexpr int kProducerRegisters = kTight ? 32 : kConsumers == 3 ? 56 : 64;
  static constexpr int kThreads = kConsumers * 128 + kProducers;
  static constexpr int kQStages = d == 64 ? 12 : kKeys == 64 ? 10 : 6;
  static constexpr int kQBytes = kTileRows * d * 2;
  static constexpr int kKeyBand = kKeys * kBandBytes;  // 64 columns of K or of V
  static constexpr int kKeyBytes = kKeys * d * 2;      // K or V
  static constexpr int kKeyStage = 2 * kKeyBytes;      // K, then V
  static constexpr int kQ = 2 * kKeyStage;
  static constexpr int kRing = kQ + kQStages * kQBytes;  // the unit of each stage
  static constexpr int kKeyFull = kRing + 2 * static_cast<int>(sizeof(Unit)), kKeyEmpty = kKeyFull + 2 * 8;
  static constexpr int kQFull = kKeyEmpty + 2 * 8, kQEmpty = kQFull + kQStages * 8;
  static constexpr int kBytes = kQEmpty + kQStages * 8;

  __device__ static int tiles(int rows) { return max((rows + kTileRows - 1) / kTileRows, kConsumers); }
};

struct Arguments {
  KeySource keys;
  const std::int32_t* rows;
  RowAddresses q;
  char* out;
  float* lse;
  Divide by_group;
  float factor;  // scale * log2 e, > 0
};

}  // namespace moba::cuda::resident
