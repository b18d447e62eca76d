// Where a token stands in the batch, on the device.
#pragma once

#include "cuda/contract.h"

namespace moba::cuda {

// The sequence that holds token `token` of the kind that kBegin and kLength speak of, or -1: a table that was refused
// (prepare_batch) holds none.
template <int DeviceSequence::*kBegin, int DeviceSequence::*kLength>
__device__ inline int find_sequence_of(const Batch& batch, int sequences, int token) {
  int low = 0, high = sequences;  // the last sequence that begins at or before the token is below `high`
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.sequences[middle].*kBegin <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (sequences == 0) return -1;
  const int begin = batch.sequences[low].*kBegin, length = batch.sequences[low].*kLength;  // read together
  return token >= begin && token - begin < length ? low : -1;
}
__device__ inline int find_sequence(const Batch& batch, int sequences, int query_token) {
  return find_sequence_of<&DeviceSequence::q_begin, &DeviceSequence::q_len>(batch, sequences, query_token);
}
__device__ inline int find_key_sequence(const Batch& batch, int sequences, int key_token) {
  return find_sequence_of<&DeviceSequence::k_begin, &DeviceSequence::k_len>(batch, sequences, key_token);
}

// Blocks, numbered through the batch, that the gate scores for a row: [low, high). Causal: those before the own block,
// which is `high` itself where has_own.
struct Candidates {
  int block_begin = 0;  // of the row's sequence
  int low = 0, high = 0;
  bool has_own = false;
};

__device__ inline Candidates candidates_of(const Shape& shape, const Batch& batch, int token) {
  const int s = find_sequence(batch, shape.batch, token);
  if (s < 0) return {};
  const DeviceSequence sequence = batch.sequences[s];
  Candidates c{sequence.block_begin, sequence.block_begin, sequence.block_begin + sequence.blocks, false};
  if (shape.causal) {
    const int position = sequence.k_len - sequence.q_len + token - sequence.q_begin;
    c.has_own = position >= 0;
    c.high = c.has_own ? sequence.block_begin + position / shape.block_size : sequence.block_begin;
  }
  return c;
}

}  // namespace moba::cuda
