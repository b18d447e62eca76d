// rope: rotates pairs of dimensions of q and k by position, and pools the rotated keys in the same pass.
//
// A CTA has `slices` slices (runs of up to 64 tokens; of keys: the groups that pool adds up) of `heads` heads. It takes
// 8 tokens of each slice at a time: cosines and sines of their positions go to shared memory, once for all heads, then
// every thread rotates two chunks of 8 columns of one head, token after token, so that it can add up the group's keys.
//
// rope_steps() leaves only the cosines and sines of the first position of each run to be evaluated here: evaluating
// both factors of the addition theorem for every position took longer than all else (210 us for 64 K keys of any number
// of heads on an H200).
#include <algorithm>
#include <climits>

#include "cuda/batch.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/launch.h"
#include "cuda/pool.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rotate.cuh"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;         // what a CTA should have
constexpr int kMaxThreads = 512;      // of a CTA that pools
constexpr int kStep = 8;              // tokens of a slice at a time
constexpr int kRun = kRopeRun;        // positions that share one evaluation of cos and sin: docs/spec.md section 3
constexpr int kSlicePairs = 512;      // at most, slices * pairs: 48 KB of cosines and sines
constexpr int kNoPosition = INT_MIN;  // of a token that lies in no sequence, or behind the slice

// The tokens of q, or of k where `blocks` is set: then slice s is group s % groups of block s / groups.
struct Source {
  View<const void> from;
  View<void> to;
  const DeviceBlock* blocks;
  int tokens, slice_tokens, groups;
  std::int64_t slices;
};

struct Slice {
  int begin = 0, tokens = 0, block = 0, block_keys = 0, first_position = 0;
};

__device__ __forceinline__ Slice slice_of(const Source& source, const Batch& batch, std::int64_t number) {
  Slice slice;
  if (number >= source.slices) return slice;
  if (source.blocks == nullptr) {
    slice.begin = static_cast<int>(number) * source.slice_tokens;
    slice.tokens = min(source.slice_tokens, source.tokens - slice.begin);
    return slice;
  }
  slice.block = static_cast<int>(number / source.groups);
  const DeviceBlock block = source.blocks[slice.block];
  const int start = static_cast<int>(number - static_cast<std::int64_t>(slice.block) * source.groups) * kPoolGroup;
  slice.block_keys = block.keys;
  slice.begin = block.key_begin + start;
  slice.tokens = min(source.slice_tokens, max(0, block.keys - start));
  if (slice.tokens > 0) slice.first_position = slice.begin - batch.sequences[block.sequence].k_begin;
  return slice;
}

__device__ __forceinline__ int position_of(const Source& source, const Batch& batch, int sequences, const Slice& slice,
                                           int i) {
  if (i >= slice.tokens) return kNoPosition;
  if (source.blocks != nullptr) return slice.first_position + i;
  const int number = find_sequence(batch, sequences, slice.begin + i);
  if (number < 0) return kNoPosition;
  const DeviceSequence& s = batch.sequences[number];
  return s.k_len - s.q_len + slice.begin + i - s.q_begin;
}

// (cos, sin). Not inlined: the code is long.
__device__ __noinline__ double2 cos_sin(double angle) {
  double2 result;
  sincos(angle, &result.y, &result.x);
  return result;
}

// cos and sin, times the magnitude, of the run's first position, a multiple of kRun.
__device__ __forceinline__ double2 run_cos_sin(const RopeParameters& rope, int run, int pair) {
  const double2 unit = cos_sin(__dmul_rn(run, rope.frequency[pair]));
  return make_double2(__dmul_rn(unit.x, rope.magnitude), __dmul_rn(unit.y, rope.magnitude));
}

// Those of position run + offset, by the addition theorem with the roundings that docs/spec.md fixes.
__device__ __forceinline__ float2 position_cos_sin(const RopeParameters& rope, const double2& run, int offset,
                                                   int pair) {
  const double2 step = __ldg(rope.steps + offset * rope.pairs + pair);
  return make_float2(static_cast<float>(__dsub_rn(__dmul_rn(run.x, step.x), __dmul_rn(run.y, step.y))),
                     static_cast<float>(__dadd_rn(__dmul_rn(run.y, step.x), __dmul_rn(run.x, step.y))));
}

__device__ __forceinline__ float2 table_cos_sin(const RopeParameters& rope, int position, int pair) {
  const std::int64_t row = max(position, 0);  // a table has no row for others
  return make_float2(__ldg(rope.cos + row * rope.cos_stride + pair), __ldg(rope.sin + row * rope.sin_stride + pair));
}

struct Layout {
  int slices, heads;  // of a CTA
  int all_heads, lanes, sequences;
};

// Shared memory. angles: float4 [slices][kStep][4][pairs / 8], the four being cosines of pairs 0-3 and 4-7 of a chunk,
// then sines: the lanes of a warp read 16 bytes side by side. The sums of the groups take the same place at the end.
struct Memory {
  float4* angles;
  double2* runs;   // [slices][2][pairs]: of the run of the slice's first position and the next
  int* positions;  // [slices][kRun]

  static __host__ __device__ std::size_t angle_bytes(const Layout& layout, int pairs, bool pools) {
    const std::size_t angles = sizeof(float) * 2 * kStep * static_cast<std::size_t>(layout.slices * pairs);
    const std::size_t sums = sizeof(float4) * 4 * static_cast<std::size_t>(layout.slices * layout.heads * layout.lanes);
    return pools && sums > angles ? sums : angles;
  }
  static __host__ __device__ std::size_t bytes(const Layout& layout, int pairs, bool pools) {
    return angle_bytes(layout, pairs, pools) + sizeof(double2) * 2 * static_cast<std::size_t>(layout.slices * pairs) +
           sizeof(int) * kRun * static_cast<std::size_t>(layout.slices);
  }
  __device__ Memory(char* memory, const Layout& layout, int pairs, bool pools)
      : angles(reinterpret_cast<float4*>(memory)),
        runs(reinterpret_cast<double2*>(memory + angle_bytes(layout, pairs, pools))),
        positions(reinterpret_cast<int*>(runs + layout.slices * 2 * pairs)) {}
};

__global__ void __launch_bounds__(kThreads) fill_steps(const __grid_constant__ RopeParameters rope, double2* steps) {
  ptx::let_next_start();
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x), offset = i / rope.pairs;
  if (offset < kRun) steps[i] = cos_sin(__dmul_rn(offset, rope.frequency[i - offset * rope.pairs]));
}

// Cosines and sines of tokens first .. first + kStep - 1 of all slices.
__device__ __forceinline__ void fill_angles(const RopeParameters& rope, const Layout& layout, const Memory& shared,
                                            int slice_tokens, int first) {
  const int pairs = rope.pairs, threads = static_cast<int>(blockDim.x);
  const int more_tokens = threads / pairs, more_pairs = threads - more_tokens * pairs;
  float* angles = reinterpret_cast<float*>(shared.angles);
  int token = static_cast<int>(threadIdx.x) / pairs, pair = static_cast<int>(threadIdx.x) - token * pairs;
  const auto next = [&] {
    token += more_tokens, pair += more_pairs;
    if (pair >= pairs) ++token, pair -= pairs;
  };
  for (; token < layout.slices * kStep; next()) {
    const int slice = token / kStep;
    const int position = shared.positions[slice * kRun + first + token % kStep];
    if (position == kNoPosition) continue;
    float2 value;
    if (rope.cos != nullptr) {
      value = table_cos_sin(rope, position, pair);
    } else {
      const int offset = position & (kRun - 1), run = position - offset;
      // Other runs than the two of the slice's first token come up where the slice holds several sequences.
      const int slice_first = shared.positions[slice * kRun], ahead = run - (slice_first & ~(kRun - 1));
      const bool at_hand = ahead == 0 || (ahead == kRun && (slice_first & (kRun - 1)) + slice_tokens > kRun);
      const double2 at_run =
          at_hand ? shared.runs[(slice * 2 + ahead / kRun) * pairs + pair] : run_cos_sin(rope, run, pair);
      value = position_cos_sin(rope, at_run, offset, pair);
    }
    if (rope.back) value.y = -value.y;
    float* to = angles + ((token * 4 + pair % 8 / 4) * (pairs / 8) + pair / 8) * 4 + pair % 4;
    to[0] = value.x;
    to[2 * 4 * (pairs / 8)] = value.y;
  }
}

__device__ __forceinline__ void store(float4* to, int stride, const float (&low)[8], const float (&high)[8]) {
  to[0] = make_float4(low[0], low[1], low[2], low[3]);
  to[stride] = make_float4(low[4], low[5], low[6], low[7]);
  to[2 * stride] = make_float4(high[0], high[1], high[2], high[3]);
  to[3 * stride] = make_float4(high[4], high[5], high[6], high[7]);
}

// Needs pairs to be a multiple of 8. Grid: (slices / layout.slices, heads / layout.heads).
template <class T, bool kInterleaved, bool kPool>
__global__ void __launch_bounds__(kPool ? kMaxThreads : kThreads, kPool ? 1 : 3)
    rotate_tokens(const __grid_constant__ RopeParameters rope, Layout layout, Source source, Batch batch,
                  View<void> centroids) {
  ptx::start_behind_previous();
  constexpr int kBatch = kPool ? 2 : 1;  // tokens under way a thread: with pooling two CTAs share an SM, else three
  extern __shared__ double2 memory[];
  const int pairs = rope.pairs, rotated_lanes = pairs / 8;
  const Memory shared(reinterpret_cast<char*>(memory), layout, pairs, kPool);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % layout.lanes;
  const int head_in_cta = thread / layout.lanes % layout.heads, slice_in_cta = thread / (layout.lanes * layout.heads);
  const int head = static_cast<int>(blockIdx.y) * layout.heads + head_in_cta;
  const std::int64_t first_slice = static_cast<std::int64_t>(blockIdx.x) * layout.slices;

  for (int i = thread; i < layout.slices * kRun; i += static_cast<int>(blockDim.x)) {
    const Slice slice = slice_of(source, batch, first_slice + i / kRun);
    shared.positions[i] = position_of(source, batch, layout.sequences, slice, i % kRun);
  }
  __syncthreads();
  if (rope.cos == nullptr) {
    for (int i = thread; i < layout.slices * 2 * pairs; i += static_cast<int>(blockDim.x)) {
      const int which = i / pairs, first = shared.positions[which / 2 * kRun];
      // The second run is that of the slice's last position, if it is another.
      const bool crosses = first % kRun != 0 && (first & (kRun - 1)) + source.slice_tokens > kRun;
      const bool needed = first != kNoPosition && (which % 2 == 0 || crosses);
      if (needed) shared.runs[i] = run_cos_sin(rope, (first & ~(kRun - 1)) + which % 2 * kRun, i - which * pairs);
    }
  }

  const bool works = slice_in_cta < layout.slices && head < layout.all_heads;
  const Slice slice = works ? slice_of(source, batch, first_slice + slice_in_cta) : Slice{};
  const bool rotates = lane < rotated_lanes;
  const int low_column = !rotates || kInterleaved ? 16 * lane : 8 * lane;
  const int high_column = !rotates || kInterleaved ? low_column + 8 : pairs + low_column;
  const std::uint16_t* from = static_cast<const std::uint16_t*>(source.from.data) + head * source.from.head_stride;
  std::uint16_t* to = static_cast<std::uint16_t*>(source.to.data) + head * source.to.head_stride;
  float low_sum[8], high_sum[8];
  clear(low_sum);
  clear(high_sum);

  struct Tokens {
    uint4 low[kBatch], high[kBatch];
  };
  const auto load = [&](int token) {
    Tokens tokens;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (token + i >= slice.tokens) continue;
      const std::uint16_t* row = from + static_cast<std::int64_t>(slice.begin + token + i) * source.from.token_stride;
      tokens.low[i] = *reinterpret_cast<const uint4*>(row + low_column);  // not __ldg: may be in place
      tokens.high[i] = *reinterpret_cast<const uint4*>(row + high_column);
    }
    return tokens;
  };
  Tokens ahead = load(0);  // always under way: while cosines are made, too
  for (int first = 0; first < source.slice_tokens; first += kStep) {
    __syncthreads();
    fill_angles(rope, layout, shared, source.slice_tokens, first);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kStep; step += kBatch) {
      Tokens now = ahead;
      ahead = load(first + step + kBatch);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + step + i;
        if (token >= slice.tokens || shared.positions[slice_in_cta * kRun + token] == kNoPosition) continue;
        uint4 &low = now.low[i], &high = now.high[i];
        if (rotates) {
          const float4* angle = shared.angles + (slice_in_cta * kStep + step + i) * 4 * rotated_lanes + lane;
          const float4 c0 = angle[0], c1 = angle[rotated_lanes], s0 = angle[2 * rotated_lanes],
                       s1 = angle[3 * rotated_lanes];
          std::uint32_t low_words[4] = {low.x, low.y, low.z, low.w}, high_words[4] = {high.x, high.y, high.z, high.w};
          rotate<T, kInterleaved>(low_words, high_words, {c0.x, c0.y, c0.z, c0.w, c1.x, c1.y, c1.z, c1.w},
                                  {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w});
          low = make_uint4(low_words[0], low_words[1], low_words[2], low_words[3]);
          high = make_uint4(high_words[0], high_words[1], high_words[2], high_words[3]);
        }
        std::uint16_t* row = to + static_cast<std::int64_t>(slice.begin + token) * source.to.token_stride;
        *reinterpret_cast<uint4*>(row + low_column) = low;
        *reinterpret_cast<uint4*>(row + high_column) = high;
        if constexpr (kPool) {
          add<T>(low_sum, low);
          add<T>(high_sum, high);
        }
      }
    }
  }
  if constexpr (!kPool) return;

  const int group = slice_in_cta % source.groups;
  if (source.groups > 1) {
    const int stride = layout.lanes, slice_stride = layout.heads * 4 * stride;
    float4* place = shared.angles + (slice_in_cta * layout.heads + head_in_cta) * 4 * stride + lane;
    __syncthreads();
    if (works && group > 0) store(place, stride, low_sum, high_sum);
    __syncthreads();
    if (group > 0) return;
    for (int other = 1; other * kPoolGroup < slice.block_keys; ++other) {
      const float4* sums = place + other * slice_stride;
      add(low_sum, sums[0], sums[stride]);
      add(high_sum, sums[2 * stride], sums[3 * stride]);
    }
  }
  if (slice.block_keys == 0) return;
  std::uint16_t* centroid =
      static_cast<std::uint16_t*>(centroids.data) + slice.block * centroids.token_stride + head * centroids.head_stride;
  *reinterpret_cast<uint4*>(centroid + low_column) = mean<T>(low_sum, slice.block_keys);
  *reinterpret_cast<uint4*>(centroid + high_column) = mean<T>(high_sum, slice.block_keys);
}

// Any number of pairs, a slice a CTA; slow.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rotate_any(const __grid_constant__ RopeParameters rope, Layout layout, Source source, Batch batch, int dim) {
  __shared__ float2 angle[128];
  const int thread = static_cast<int>(threadIdx.x), pairs = rope.pairs;
  const Slice slice = slice_of(source, batch, blockIdx.x);
  const auto load = [&](const T* at) { return static_cast<float>(*at); };
  for (int i = 0; i < slice.tokens; ++i) {
    const int position = position_of(source, batch, layout.sequences, slice, i);
    if (position == kNoPosition) continue;
    __syncthreads();
    if (thread < pairs) {
      const int offset = position & (kRun - 1);
      angle[thread] = rope.cos != nullptr
                          ? table_cos_sin(rope, position, thread)
                          : position_cos_sin(rope, run_cos_sin(rope, position - offset, thread), offset, thread);
      if (rope.back) angle[thread].y = -angle[thread].y;
    }
    __syncthreads();
    const std::int64_t token = slice.begin + i;
    const int places = dim - pairs;  // pairs, then the columns that pass
    for (int j = thread; j < layout.all_heads * places; j += kThreads) {
      const int head = j / places, place = j - head * places;
      const T* from =
          static_cast<const T*>(source.from.data) + token * source.from.token_stride + head * source.from.head_stride;
      T* to = static_cast<T*>(source.to.data) + token * source.to.token_stride + head * source.to.head_stride;
      if (place >= pairs) {
        to[place + pairs] = from[place + pairs];
        continue;
      }
      const int first = rope.interleaved ? 2 * place : place, second = rope.interleaved ? first + 1 : place + pairs;
      const float x0 = load(from + first), x1 = load(from + second), c = angle[place].x, s = angle[place].y;
      to[first] = T(exact_difference(x0, c, x1, s));
      to[second] = T(exact_sum(x1, c, x0, s));
    }
  }
}

// Heads and slices of a CTA of at most `threads`: slices come `together` at a time.
Layout layout_of(const Shape& shape, const RopeParameters& rope, int heads, int threads, int together) {
  const int lanes = shape.head_dim / 16, parts = divide_up(heads, std::max(1, threads / (together * lanes)));
  const int heads_of_cta = divide_up(heads, parts);
  const int fit =
      std::min(kThreads / (together * heads_of_cta * lanes), kSlicePairs / (together * std::max(1, rope.pairs)));
  return {std::max(1, fit) * together, heads_of_cta, heads, lanes, shape.batch};
}

template <class T, bool kInterleaved, bool kPool>
void launch_rotate(const RopeParameters& rope, const Layout& layout, const Source& source, const Batch& batch,
                   const View<void>& centroids, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((source.slices + layout.slices - 1) / layout.slices),
                  divide_up(layout.all_heads, layout.heads));
  launch(Start::early, rotate_tokens<T, kInterleaved, kPool>, grid,
         divide_up(layout.slices * layout.heads * layout.lanes, 32) * 32, Memory::bytes(layout, rope.pairs, kPool),
         stream, rope, layout, source, batch, centroids);
}

template <class T>
void rotate_of(const Shape& shape, const RopeParameters& rope, const Layout& layout, const Source& source,
               const Batch& batch, bool pools, const View<void>& centroids, cudaStream_t stream) {
  if (rope.pairs % 8 != 0) {
    launch(rotate_any<T>, dim3(static_cast<unsigned>(source.slices)), kThreads, 0, stream, rope, layout, source, batch,
           shape.head_dim);
    return;
  }
  const auto kernel = rope.interleaved ? (pools ? launch_rotate<T, true, true> : launch_rotate<T, true, false>)
                                       : (pools ? launch_rotate<T, false, true> : launch_rotate<T, false, false>);
  kernel(rope, layout, source, batch, centroids, stream);
}

void rotate_source(const Shape& shape, const RopeParameters& rope, const Layout& layout, const Source& source,
                   const Batch& batch, bool pools, const View<void>& centroids, cudaStream_t stream) {
  const auto rotate = shape.dtype == DType::bf16 ? rotate_of<__nv_bfloat16> : rotate_of<__half>;
  rotate(shape, rope, layout, source, batch, pools, centroids, stream);
}

}  // namespace

void rope_steps(const RopeParameters& rope, double2* steps, cudaStream_t stream) {
  launch(fill_steps, dim3(divide_up(kRun * rope.pairs, kThreads)), kThreads, 0, stream, rope, steps);
}

void rope_queries(const Shape& shape, const RopeParameters& rope, Batch batch, View<const void> q, View<void> q_rotated,
                  cudaStream_t stream) {
  const Layout layout = layout_of(shape, rope, shape.q_heads, kThreads, 1);
  // Few tokens: more CTAs of fewer.
  const int tokens = shape.total_q / (layout.slices * 32) >= 2 * shape.sm_count ? 32 : kStep;
  const Source source{q, q_rotated, nullptr, shape.total_q, tokens, 1, divide_up(shape.total_q, tokens)};
  rotate_source(shape, rope, layout, source, batch, false, {}, stream);
}

void rope_keys(const Shape& shape, const RopeParameters& rope, Batch batch, View<const void> k, View<void> k_rotated,
               View<void> centroids, cudaStream_t stream) {
  const int groups = divide_up(shape.block_size, kPoolGroup), lanes = shape.head_dim / 16;
  // Long blocks are pooled by themselves: a CTA that holds all groups of a block would have few heads to share the
  // cosines, and attention over such blocks takes far longer than one more reading of k.
  const bool wanted = centroids.data != nullptr;
  const bool pools =
      wanted && rope.pairs % 8 == 0 && groups * rope.pairs <= kSlicePairs && groups * lanes <= kMaxThreads;
  const Layout layout = pools ? layout_of(shape, rope, shape.kv_heads, kMaxThreads, groups)
                              : layout_of(shape, rope, shape.kv_heads, kThreads, 1);
  const Source source{k,
                      k_rotated,
                      batch.blocks,
                      shape.total_k,
                      std::min(shape.block_size, kPoolGroup),
                      groups,
                      static_cast<std::int64_t>(shape.max_blocks) * groups};
  rotate_source(shape, rope, layout, source, batch, pools, centroids, stream);
  if (wanted && !pools) {
    pool(shape, batch, {k_rotated.data, k_rotated.token_stride, k_rotated.head_stride}, centroids, stream);
  }
}

}  // namespace moba::cuda
