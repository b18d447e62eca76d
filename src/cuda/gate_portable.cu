// gate for every device from sm_80 on: scores by mma.sync, and for each row an exact top-k.
//
// A CTA takes 128 rows of one key head (64 where shared memory is short), 32 to a warp. Centroids pass by in tiles of
// 64 blocks, the most recent first, each in pieces of 64 columns (8 KB) through a ring of three. The scores of a tile,
// [32, 64] for a warp, go from registers to shared memory 16 blocks at a time; then every lane looks after one row: one
// comparison for each score with the worst that is listed so far gives a mask, and only the blocks in the mask (about
// k ln(n / k) of n, in random order) are offered to the row's list, a heap with the worst at its root. A heap costs
// log2(k) steps for each, and all 32 rows of a warp step at once. Nothing depends on the order in which warps run.
//
// The order of blocks is that of 64-bit keys: the score as an integer of the same order, above the block. Blocks come
// in descending order, so one that scores no more than the worst of a full list never enters.
#include <algorithm>
#include <climits>

#include "cuda/batch.cuh"
#include "cuda/contract.h"
#include "cuda/lanes.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/swizzle.cuh"

namespace moba::cuda {
namespace {

constexpr int kWarpRows = 32;
constexpr int kTileBlocks = 64;
constexpr int kGroupBlocks = 16;  // scores that stand in shared memory at once
constexpr int kPieceColumns = 64;
constexpr int kPieceBytes = kTileBlocks * kPieceColumns * 2;
constexpr int kStages = 3;
// Floats from one block's scores to the next: a warp's stores, 8 rows of 4 blocks, meet no bank twice.
constexpr int kScoreStride = 36;
constexpr int kScoreBytes = kGroupBlocks * kScoreStride * 4;
constexpr int kSharedLimit = 99 * 1024;

struct Arguments {
  Shape shape;
  Slab slab;
  Batch batch;
  View<const void> q, centroids;
  IdsView<std::int32_t> ids;
  CountsView counts;
  int wanted;  // blocks that a row chooses by score
};

// Byte offsets in shared memory of a CTA of `warps` warps. Pieces hold rows of 128 bytes; 16-byte chunk c of row r
// stands at place c ^ (r % 8).
struct Layout {
  int ring, scores, keys, low, bytes;

  __host__ __device__ Layout(int head_dim, int wanted, int warps) {
    const int pieces = (head_dim + kPieceColumns - 1) / kPieceColumns;
    const int rows = kWarpRows * warps;
    ring = pieces * rows * kPieceColumns * 2;  // q comes first: [piece][row][64]
    scores = ring + kStages * kPieceBytes;
    keys = scores + warps * kScoreBytes;  // [warp][wanted][32 rows]
    low = keys + rows * wanted * 8;       // first and last candidates of the warps
    bytes = low + warps * 8;
  }
};

// Greater for what is to be chosen first; 0 is no block. NaN lies below -inf, -0 equals +0.
__device__ __forceinline__ std::uint64_t key_of(float score, int block) {
  const std::uint32_t bits = __float_as_uint(score + 0.0f);
  std::uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  if (score != score) ordered = 1;
  return std::uint64_t{ordered} << 32 | static_cast<std::uint32_t>(block);
}

// The score of a key; NaN for that of a NaN and for no block.
__device__ __forceinline__ float score_of(std::uint64_t key) {
  const auto ordered = static_cast<std::uint32_t>(key >> 32);
  return __uint_as_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The best blocks of a row, its lane's column of [wanted][32] keys: a heap, the worst at the root.
class List {
 public:
  __device__ List(std::uint64_t* keys, int wanted) : keys_(keys), wanted_(wanted), threshold_(score_of(0)) {
    for (int i = 0; i < wanted_; ++i) at(i) = 0;
  }

  // Scores that are at most this never enter; NaN: all others are worth a look.
  __device__ float threshold() const { return threshold_; }

  __device__ void offer(std::uint64_t key) {
    if (key <= root_) return;
    int i = 0;
    for (int child = 1; child < wanted_; child = 2 * i + 1) {
      std::uint64_t lower = at(child);
      if (child + 1 < wanted_) {
        const std::uint64_t right = at(child + 1);
        if (right < lower) {
          lower = right;
          ++child;
        }
      }
      if (lower >= key) break;
      at(i) = lower;
      i = child;
    }
    at(i) = key;
    root_ = at(0);
    threshold_ = score_of(root_);
  }

  // Puts the blocks in ascending order into the upper words of the keys; returns how many there are.
  __device__ int sort() {
    int count = 0;
    for (int i = 0; i < wanted_; ++i) {
      if (at(i) == 0) word(i, 0) = kNone;
    }
    for (int first = 0; first < wanted_; first += kTogether) {
      std::uint32_t block[kTogether];
      int rank[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        block[j] = first + j < wanted_ ? word(first + j, 0) : kNone;
        rank[j] = 0;
        if (block[j] != kNone) ++count;
      }
      for (int i = 0; i < wanted_; ++i) {
        const std::uint32_t other = word(i, 0);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) rank[j] += other < block[j] ? 1 : 0;
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (block[j] != kNone) word(rank[j], 1) = block[j];
      }
    }
    return count;
  }

 private:
  static constexpr int kTogether = 4;
  static constexpr std::uint32_t kNone = 0xffffffffu;

  __device__ std::uint64_t& at(int i) { return keys_[i * kWarpRows]; }
  __device__ std::uint32_t& word(int i, int upper) { return reinterpret_cast<std::uint32_t*>(&at(i))[upper]; }

  std::uint64_t* keys_;
  int wanted_;
  std::uint64_t root_ = 0;
  float threshold_;
};

// What a lane knows of its row.
struct Row {
  Candidates candidates;
  std::int64_t ids = -1;  // offset of the row's ids; -1 for a lane without a row
  std::int64_t count = 0;
};

__device__ Row find_row(const Arguments& p, std::int64_t slab_row) {
  Row row;
  if (slab_row >= std::int64_t{p.slab.tokens} * p.shape.group) return row;
  const auto token = static_cast<int>(slab_row / p.shape.group);
  const auto member = static_cast<int>(slab_row - std::int64_t{token} * p.shape.group);
  const auto head = static_cast<int>(blockIdx.y);
  row.candidates = candidates_of(p.shape, p.batch, p.slab.token_begin + token);
  row.ids = head * p.ids.head_stride + token * p.ids.token_stride + member * p.ids.group_stride;
  row.count = head * p.counts.head_stride + token * p.counts.token_stride + member * p.counts.group_stride;
  return row;
}

// Rows first_row ... of the slab to shared memory; those behind its last are zero.
template <class T>
__device__ void copy_queries(const Arguments& p, std::uint32_t to, std::int64_t first_row) {
  const int threads = static_cast<int>(blockDim.x);
  const int chunk = static_cast<int>(threadIdx.x) % 8;
  const T* data = static_cast<const T*>(p.q.data);
  for (int row = static_cast<int>(threadIdx.x) / 8; row < threads; row += threads / 8) {
    const std::int64_t slab_row = first_row + row;
    const bool there = slab_row < std::int64_t{p.slab.tokens} * p.shape.group;
    const std::int64_t token = slab_row / p.shape.group;
    const std::int64_t head = (p.slab.head_begin + static_cast<int>(blockIdx.y)) * std::int64_t{p.shape.group} +
                              slab_row - token * p.shape.group;
    const std::int64_t offset = (p.slab.token_begin + token) * p.q.token_stride + head * p.q.head_stride;
    for (int column = chunk * 8; column < p.shape.head_dim; column += kPieceColumns) {
      const std::uint32_t piece = to + static_cast<std::uint32_t>(column / kPieceColumns * threads * 128);
      ptx::copy_async(piece + swizzled(kBandBytes, row, chunk), there ? data + offset + column : data, there ? 16 : 0);
    }
  }
}

// Columns [64 piece, 64 piece + 64) of the centroids of a tile that are below `end`.
template <class T>
__device__ __forceinline__ void copy_piece(const Arguments& p, std::uint32_t to, int tile, int end, int piece) {
  const int chunk = static_cast<int>(threadIdx.x) % 8;
  const int column = piece * kPieceColumns + chunk * 8;
  if (column >= p.shape.head_dim) return;
  const T* data = static_cast<const T*>(p.centroids.data);
  const std::int64_t offset = (p.slab.head_begin + static_cast<int>(blockIdx.y)) * p.centroids.head_stride + column;
  for (int row = static_cast<int>(threadIdx.x) / 8; row < kTileBlocks; row += static_cast<int>(blockDim.x) / 8) {
    const int block = tile * kTileBlocks + row;
    const bool there = block < end;
    ptx::copy_async(to + swizzled(kBandBytes, row, chunk),
                    there ? data + block * p.centroids.token_stride + offset : data, there ? 16 : 0);
  }
}

// Scores of a warp: lane 4r + c holds blocks 8x + 2c, + 1 of rows r and r + 8 of each 16.
using Scores = float[kWarpRows / 16][kTileBlocks / 8][4];

// scores += q c^T over `columns` columns of a piece. q and c: this lane's ldmatrix addresses of chunks 0 and 1.
template <class T>
__device__ __forceinline__ void add_products(Scores& scores, std::uint32_t q, std::uint32_t c, int columns) {
#pragma unroll
  for (int i = 0; i < kPieceColumns / 16; ++i) {
    if (i * 16 >= columns) break;
    const std::uint32_t place = static_cast<std::uint32_t>(i << 5);
    std::uint32_t a[kWarpRows / 16][4];
#pragma unroll
    for (int m = 0; m < kWarpRows / 16; ++m) ptx::load_matrix_x4(a[m], (q ^ place) + m * 16 * 128);
#pragma unroll
    for (int n = 0; n < kTileBlocks / 16; ++n) {
      std::uint32_t b[4];
      ptx::load_matrix_x4(b, (c ^ place) + n * 16 * 128);
#pragma unroll
      for (int m = 0; m < kWarpRows / 16; ++m) {
        ptx::mma_m16n8k16<T>(scores[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Offers the blocks of a tile that are candidates of this lane's row, the most recent first.
__device__ __forceinline__ void offer_scores(List& list, const Scores& scores, float* shared, int tile,
                                             const Candidates& candidates) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int group = kTileBlocks / kGroupBlocks - 1; group >= 0; --group) {
    const int begin = tile * kTileBlocks + group * kGroupBlocks;
    const int low = min(max(candidates.low - begin, 0), kGroupBlocks);
    const int high = min(max(candidates.high - begin, 0), kGroupBlocks);
    const std::uint32_t allowed = low < high ? (1u << high) - (1u << low) : 0;
    if (!__any_sync(kAllLanes, allowed != 0)) continue;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kWarpRows / 16; ++m) {
#pragma unroll
      for (int x = 0; x < kGroupBlocks / 8; ++x) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          shared[(8 * x + lane % 4 * 2 + e % 2) * kScoreStride + 16 * m + e / 2 * 8 + lane / 4] =
              scores[m][group * (kGroupBlocks / 8) + x][e];
        }
      }
    }
    __syncwarp();
    const float threshold = list.threshold();
    std::uint32_t hits = 0;
#pragma unroll
    for (int i = 0; i < kGroupBlocks; ++i) hits |= shared[i * kScoreStride + lane] <= threshold ? 0u : 1u << i;
    for (hits &= allowed; hits != 0;) {
      const int i = 31 - __clz(static_cast<int>(hits));
      hits ^= 1u << i;
      list.offer(key_of(shared[i * kScoreStride + lane], begin + i));
    }
  }
}

// Writes the ids of a warp's rows, the lanes side by side along the ids. `keys` are the warp's sorted lists, `count`
// says how many blocks of this lane's list there are.
__device__ void write_ids(const Arguments& p, const std::uint64_t* keys, const Row& row, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int own = row.candidates.has_own ? row.candidates.high - row.candidates.block_begin : -1;
  if (row.ids >= 0 && p.counts.data != nullptr) p.counts.data[row.count] = count + (row.candidates.has_own ? 1 : 0);
  const int slots = p.shape.slots;
  for (int j = 0; j < slots; ++j) {
    const int from = (32 * j + lane) / slots;  // the lane that knows the row
    const int slot = 32 * j + lane - from * slots;
    const int chosen = __shfl_sync(kAllLanes, count, from);
    const int last = __shfl_sync(kAllLanes, own, from);
    const int block_begin = __shfl_sync(kAllLanes, row.candidates.block_begin, from);
    const long long ids = __shfl_sync(kAllLanes, static_cast<long long>(row.ids), from);
    if (ids < 0) continue;
    int id = slot == chosen ? last : -1;
    if (slot < chosen) id = static_cast<int>(keys[slot * kWarpRows + from] >> 32) - block_begin;
    p.ids.data[ids + slot] = id;
  }
}

template <class T>
__global__ void __launch_bounds__(128, 3) gate_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int head_dim = p.shape.head_dim;
  const Layout layout(head_dim, p.wanted, warps);
  const std::uint32_t q = ptx::shared_address(shared_bytes), ring = q + static_cast<std::uint32_t>(layout.ring);
  float* shared_scores = reinterpret_cast<float*>(shared_bytes + layout.scores + warp * kScoreBytes);
  auto* keys = reinterpret_cast<std::uint64_t*>(shared_bytes + layout.keys) + warp * p.wanted * kWarpRows;
  int* ranges = reinterpret_cast<int*>(shared_bytes + layout.low);

  // The longest rows first: causal rows have the more candidates the later they are.
  const std::int64_t part = p.shape.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const std::int64_t first_row = part * blockDim.x;
  const Row row = find_row(p, first_row + threadIdx.x);
  Candidates candidates = row.candidates;
  if (p.wanted == 0) candidates.high = candidates.low;
  const bool any = candidates.low < candidates.high;
  const int warp_low = __reduce_min_sync(kAllLanes, any ? candidates.low : INT_MAX);
  const int warp_high = __reduce_max_sync(kAllLanes, any ? candidates.high : 0);
  if (lane == 0) {
    ranges[2 * warp] = warp_low;
    ranges[2 * warp + 1] = warp_high;
  }
  __syncthreads();
  int low = ranges[0], high = ranges[1];
  for (int i = 1; i < warps; ++i) {
    low = min(low, ranges[2 * i]);
    high = max(high, ranges[2 * i + 1]);
  }

  List list(keys + lane, p.wanted);
  if (low < high) {
    const int pieces = (head_dim + kPieceColumns - 1) / kPieceColumns;
    const int last_tile = low / kTileBlocks;
    int copy_tile = (high - 1) / kTileBlocks, copy_of = 0, copy_stage = 0;  // the piece to be copied next
    const auto copy_next = [&] {
      if (copy_tile >= last_tile)
        copy_piece<T>(p, ring + static_cast<std::uint32_t>(copy_stage * kPieceBytes), copy_tile, high, copy_of);
      ptx::copy_async_commit();
      copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      if (++copy_of == pieces) {
        copy_of = 0;
        --copy_tile;
      }
    };
    const std::uint32_t q_lane = q + swizzled(kBandBytes, warp * kWarpRows + lane % 16, lane / 16);
    const std::uint32_t c_lane = ring + swizzled(kBandBytes, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    int stage = 0;
    copy_queries<T>(p, q, first_row);
    copy_next();
    copy_next();
    for (int tile = (high - 1) / kTileBlocks; tile >= last_tile; --tile) {
      const bool active = tile * kTileBlocks < warp_high && (tile + 1) * kTileBlocks > warp_low;
      Scores scores = {};
      for (int piece = 0; piece < pieces; ++piece) {
        ptx::copy_async_wait<1>();
        __syncthreads();  // the piece is there, and that of the step before is free
        copy_next();
        if (active) {
          add_products<T>(scores, q_lane + static_cast<std::uint32_t>(piece * warps * kWarpRows * 128),
                          c_lane + static_cast<std::uint32_t>(stage * kPieceBytes), head_dim - piece * kPieceColumns);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      if (active) offer_scores(list, scores, shared_scores, tile, candidates);
    }
    ptx::copy_async_wait_all();
  }
  const int count = list.sort();
  __syncwarp();
  write_ids(p, keys, row, count);
}

}  // namespace

void gate_portable(const Shape& shape, Slab slab, Batch batch, View<const void> q, View<const void> centroids,
                   IdsView<std::int32_t> ids, CountsView counts, cudaStream_t stream) {
  if (slab.tokens == 0 || slab.heads == 0) return;
  const Arguments arguments{shape,     slab, batch,  q,
                            centroids, ids,  counts, std::max(0, shape.slots - (shape.causal ? 1 : 0))};
  const int most = Layout(shape.head_dim, arguments.wanted, 4).bytes;
  const int warps = most <= kSharedLimit ? 4 : 2;
  const std::int64_t rows = std::int64_t{slab.tokens} * shape.group;
  const int cta_rows = kWarpRows * warps;
  const dim3 grid(static_cast<unsigned>((rows + cta_rows - 1) / cta_rows), static_cast<unsigned>(slab.heads));
  launch(shape.dtype == DType::bf16 ? gate_kernel<__nv_bfloat16> : gate_kernel<__half>, grid, cta_rows,
         static_cast<std::size_t>(Layout(shape.head_dim, arguments.wanted, warps).bytes), stream, arguments);
}

}  // namespace moba::cuda
