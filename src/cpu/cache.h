// append and decode of the cpu backend, and how decode cuts a batch up.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache_call.h"
#include "carver.h"
#include "cpu/workers.h"

namespace moba::cpu {

void append(const CacheCall& call, const ConstTensor& k, const ConstTensor& v);
void decode(const CacheCall& call, const ConstTensor& q, const DecodeOutputs& outputs);
std::size_t decode_bytes(const CachePlan::Impl& plan);

// decode has two ways. Sequences with few new rows are taken together and split over key heads and the keys of every
// chosen block, so that one token keeps all threads busy: its partial results, over at most kPieceKeys keys each, are
// merged in the order of the keys. A sequence with many new rows is a call of gate, index and attend, which share the
// packed keys among the rows. Which way is taken depends on shapes and lengths alone.
inline constexpr std::int64_t kSplitRows = 64;      // rows of a key head that are few
inline constexpr std::int64_t kSplitUnits = 16384;  // partial results that are few; one token is split in any case
inline constexpr std::int64_t kPieceKeys = 1024;
inline constexpr std::int64_t kScoreTile = 64;  // blocks of one task of the gate

// Bounds of what is split at a time, and the memory for it.
struct SplitSizes {
  std::int64_t pieces = 1;  // of a block
  std::int64_t units = 1;   // partial results of a row: slots * pieces
  std::int64_t columns;     // scores of a row: all blocks, up to whole tiles
  std::int64_t dim;         // d up to whole vectors of any target
  std::int64_t rows;        // query heads x tokens, of all sequences
  std::int64_t partials;    // rows x units

  explicit SplitSizes(const CachePlan::Impl& plan);
  // Whether a sequence is split: its rows per key head, and the blocks that a row of it chooses at most.
  bool splits(const CachePlan::Impl& plan, const CachedSequence& s) const;
};

// What a row chose: the choices of a key head of a sequence stand together, ordered by block and row.
struct Choice {
  std::int32_t block, row, slot;
};

// The rows of one key head of one sequence.
struct SplitGroup {
  const CachedSequence* sequence;
  std::int64_t head;
  std::int64_t row;                     // the first of its rows, among all that are split; they are token * g + head
  std::int64_t choice;                  // the first of its choices
  std::int64_t blocks = 0;              // different blocks that its rows chose
  std::int64_t first_tile, first_task;  // tasks of the gate and of attend before it
};

struct SplitMemory {
  std::int32_t *ids, *counts;  // [rows][slots], [rows]
  float* scores;               // [rows][columns]
  Choice* choices;             // [rows x slots]
  std::int32_t* block_starts;  // [rows x slots + groups]: of a group, the first choice of each block, and the end
  std::int32_t* left;          // [groups]: tasks that are still to do
  float *maximum, *sum, *out;  // [partials], [partials], [partials][dim]

  SplitMemory(Carver& carver, const CachePlan::Impl& plan, const SplitSizes& sizes);
};

// Of one thread.
struct SplitScratch {
  float* q;                    // [kRowTile][dim]
  float* centroids;            // packed: [d][kScoreTile]
  float *keys, *values;        // [kKeyTile][dim]: rows that had to be widened
  float* scores;               // [kRowTile][kKeyTile]
  std::int64_t *best, *spare;  // [slots], [2][kGateTile + slots]

  SplitScratch(Carver& carver, const CachePlan::Impl& plan, const SplitSizes& sizes);
};

}  // namespace moba::cpu
