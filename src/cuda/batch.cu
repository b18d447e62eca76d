// prepare_batch: the tables of the batch on the device: [batch] sequences from cu_seqlens, then [max_blocks] blocks. Up
// to 1024 sequences take one launch, in which every CTA scans all sequences for itself; more take two.
#include "cuda/batch.cuh"
#include "cuda/contract.h"
#include "cuda/launch.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/scan.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kBlockThreads = 256;

// cu_seqlens of queries or keys; null stands for {0, total}.
struct Table {
  const std::int32_t* entries;
  std::int64_t longest;
  int total;

  __device__ int operator[](int i) const { return entries != nullptr ? entries[i] : i == 0 ? 0 : total; }
  // Whether entries i and i + 1 bound a sequence that the plan allows. All of them do, and so do the ends: the table
  // ascends from 0 to the total.
  __device__ bool allows(int i, int batch) const {
    const int begin = (*this)[i], end = (*this)[i + 1];
    return begin <= end && static_cast<std::int64_t>(end) - begin <= longest && (i != 0 || begin == 0) &&
           (i != batch - 1 || end == total);
  }
};

// Both tables at sequence s. from_zero: no query may lie before the first key.
__device__ __forceinline__ bool allow(const Table& q, const Table& k, int s, int batch, bool from_zero) {
  return q.allows(s, batch) && k.allows(s, batch) && (!from_zero || q[s + 1] - q[s] <= k[s + 1] - k[s]);
}

// Sequence s of a table that is good, its first block not yet known.
__device__ __forceinline__ DeviceSequence sequence_of(const Table& q, const Table& k, int s, int block_size) {
  const int q_begin = q[s], k_begin = k[s], k_len = k[s + 1] - k_begin;
  return {q_begin, q[s + 1] - q_begin, k_begin, k_len, 0, k_len / block_size + (k_len % block_size != 0)};
}

// Block `number` of the batch; `sequences` may be in shared memory.
__device__ __forceinline__ DeviceBlock block_of(const DeviceSequence* sequences, int batch, int block_size,
                                                int number) {
  int low = 0, high = batch;  // the last sequence whose blocks begin at or before `number` is below `high`
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (sequences[middle].block_begin <= number ? low : high) = middle;
  }
  if (batch == 0) return {};
  const DeviceSequence s = sequences[low];
  const int within = number - s.block_begin;
  if (within >= s.blocks) return {};
  const int start = within * block_size;
  return {s.k_begin + start, min(block_size, s.k_len - start), s.q_begin + s.q_len - s.k_len + start, low};
}

// Up to kThreads sequences; a thread a block.
__global__ void __launch_bounds__(kThreads) list_all(Table q, Table k, bool from_zero, int batch, int block_size,
                                                     int max_blocks, DeviceSequence* sequences, DeviceBlock* blocks) {
  ptx::let_next_start();
  __shared__ int scratch[kScanScratch];
  __shared__ DeviceSequence all[kThreads];
  const int s = static_cast<int>(threadIdx.x);
  const bool allowed = s >= batch || allow(q, k, s, batch, from_zero);
  DeviceSequence sequence{};
  if (s < batch) sequence = sequence_of(q, k, s, block_size);
  if (__syncthreads_and(allowed) == 0) sequence = {};
  int total = 0;
  if (batch > 1) sequence.block_begin = scan_block(sequence.blocks, scratch, &total);
  if (s < batch) {
    all[s] = sequence;
    if (blockIdx.x == 0) sequences[s] = sequence;
  }
  __syncthreads();
  const int number = static_cast<int>(blockIdx.x) * kThreads + s;
  if (number < max_blocks) blocks[number] = block_of(all, batch, block_size, number);
}

// One CTA: the blocks of the sequences are numbered by a scan, kThreads sequences at a time.
__global__ void __launch_bounds__(kThreads)
    list_sequences(Table q, Table k, bool from_zero, int batch, int block_size, DeviceSequence* sequences) {
  __shared__ int scratch[kScanScratch];
  bool good = true;
  for (int s = static_cast<int>(threadIdx.x); s < batch; s += kThreads) {
    good = good && allow(q, k, s, batch, from_zero);
  }
  good = __syncthreads_and(good) != 0;
  int blocks_before = 0;
  for (int first = 0; first < batch; first += kThreads) {
    const int s = first + static_cast<int>(threadIdx.x);
    DeviceSequence sequence{};
    if (good && s < batch) sequence = sequence_of(q, k, s, block_size);
    int total;
    sequence.block_begin = blocks_before + scan_block(sequence.blocks, scratch, &total);
    blocks_before += total;
    if (s < batch) sequences[s] = sequence;
  }
}

__global__ void __launch_bounds__(kBlockThreads)
    list_blocks(const DeviceSequence* sequences, int batch, int block_size, int max_blocks, DeviceBlock* blocks) {
  ptx::let_next_start();
  const int number = static_cast<int>(blockIdx.x) * kBlockThreads + static_cast<int>(threadIdx.x);
  if (number < max_blocks) blocks[number] = block_of(sequences, batch, block_size, number);
}

}  // namespace

void prepare_batch(const Shape& shape, const std::int32_t* cu_seqlens_q, const std::int32_t* cu_seqlens_k,
                   std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, bool from_zero, DeviceSequence* sequences,
                   DeviceBlock* blocks, cudaStream_t stream) {
  const Table q{cu_seqlens_q, max_seqlen_q, shape.total_q}, k{cu_seqlens_k, max_seqlen_k, shape.total_k};
  if (shape.batch <= kThreads) {
    const int ctas = (shape.max_blocks + kThreads - 1) / kThreads;
    launch(list_all, dim3(shape.batch > 0 && ctas == 0 ? 1 : ctas), kThreads, 0, stream, q, k, from_zero, shape.batch,
           shape.block_size, shape.max_blocks, sequences, blocks);
    return;
  }
  launch(list_sequences, dim3(1), kThreads, 0, stream, q, k, from_zero, shape.batch, shape.block_size, sequences);
  launch(list_blocks, dim3((shape.max_blocks + kBlockThreads - 1) / kBlockThreads), kBlockThreads, 0, stream, sequences,
         shape.batch, shape.block_size, shape.max_blocks, blocks);
}

}  // namespace moba::cuda
