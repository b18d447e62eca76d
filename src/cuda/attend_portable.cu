// attend for every device from sm_80 on, by mma.sync, ldmatrix and cp.async, in the manner of FlashAttention-2.
//
// A CTA of four warps takes one unit at a time: its rows [128 or 64, d] are gathered into shared memory, its keys and
// values [64, d] pass by a tile at a time, scores [rows, 64] and outputs [rows, d] stay in registers. A warp owns 32
// rows up to d = 128: every fragment of k and v is then used twice, and without that shared memory is the limit (256
// bytes for each product at 16 rows, more than an SM delivers at the rate of its mma.sync). At d = 256 the outputs of
// 16 rows fill the registers. Two CTAs share an SM, so that one computes while the other waits.
//
// In shared memory a row of q, k or v is 2 d bytes; its 16-byte chunk c stands at place c ^ (row % 8), so that the
// eight rows that ldmatrix reads lie in different banks.
#include <numbers>

#include "cuda/attend_portable_rows.cuh"
#include "cuda/attend_portable_tiles.cuh"
#include "cuda/contract.h"
#include "cuda/launch.h"

namespace moba::cuda {
namespace {

using namespace portable;

constexpr int kCtasPerSm = 2;
// Units of at most so many keys are not worth a ticket.
constexpr int kShortUnitKeys = 128;

// A weight of 0 does not silence an infinite or NaN value (0 * NaN is NaN), so values that some row must not see are
// treated by hand: added to the rows that see them, then set to 0. Rows [from, to) of the tile; rare.
template <class T, int kDim>
__device__ __forceinline__ void separate_nonfinite(WarpRows<T, kDim>& rows, T* v, const int* limits, int begin,
                                                   int from, int to) {
  constexpr int kWords = kDim / 2;
  const auto word = [v](int i) {
    const auto place = swizzled(2 * kDim, i / kWords, i % kWords / 4) + i % 4 * 4;
    return reinterpret_cast<std::uint32_t*>(reinterpret_cast<char*>(v) + place);
  };
  int found = 0;
  for (int i = from * kWords + static_cast<int>(threadIdx.x); i < to * kWords; i += kThreads) {
    found |= has_nonfinite<T>(*word(i));
  }
  if (__syncthreads_or(found) == 0) return;
  rows.add_nonfinite(v, limits, begin, from, to);
  __syncthreads();
  for (int i = from * kWords + static_cast<int>(threadIdx.x); i < to * kWords; i += kThreads) {
    const float2 values = ptx::unpack<T>(*word(i));
    *word(i) = ptx::pack<T>(isfinite(values.x) ? values.x : 0.0f, isfinite(values.y) ? values.y : 0.0f);
  }
  __syncthreads();
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) attend_kernel(const __grid_constant__ Arguments p) {
  using Layout = Tiles<T, kDim>;
  constexpr int kRowBytes = Layout::kRowBytes;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Layout::Shared*>(shared_bytes);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * Layout::kWarpRows;
  const int lane_row = first_row + lane / 4;
  const std::uint32_t q = ptx::shared_address(shared.q);
  const std::uint32_t k = ptx::shared_address(shared.k);
  const std::uint32_t v = ptx::shared_address(shared.v);
  // What this lane addresses for ldmatrix: 16 rows by 16 columns of q, the same of k with the tiles in another order,
  // and of v.
  const std::uint32_t q_lane = q + swizzled(kRowBytes, first_row + lane % 16, lane / 16);
  const std::uint32_t k_lane = k + swizzled(kRowBytes, lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const std::uint32_t v_lane = v + swizzled(kRowBytes, lane % 16, lane / 16);
  const bool cancel = p.scale_log2e == 0.0f;
  const float c = cancel ? 1.0f : p.scale_log2e;

  if (p.head_dim < kDim) {
    constexpr int kQuads = (Layout::kRows + 2 * kTileKeys) * kRowBytes / 16;
    auto* quads = reinterpret_cast<uint4*>(shared_bytes);
    for (int i = static_cast<int>(threadIdx.x); i < kQuads; i += kThreads) quads[i] = make_uint4(0, 0, 0, 0);
  }

  Units<T, kDim> units(p, shared);
  const auto copy_next_unit = [&] {
    const Unit& unit = units.next();
    if (unit.rows == 0) return;
    copy_queries<T, kDim, Layout::kRows>(q, p.input.q.data, shared.q_offset, p.head_dim);
    copy_keys<T, kDim>(k, p.input.k, unit.head, unit.key_begin, unit.keys, p.head_dim);
  };
  units.start();
  __syncthreads();
  copy_next_unit();
  units.turn();

  WarpRows<T, kDim> rows;
  for (; units.current().rows > 0; units.turn()) {
    const Unit& unit = units.current();
    const int* limits = units.limits();
    // Limits ascend with the rows.
    const int least = limits[0];
    const int most = limits[unit.rows - 1];
    const int own_most = first_row < unit.rows ? limits[min(unit.rows, first_row + Layout::kWarpRows) - 1] : 0;
    const int tiles = max(1, (most + kTileKeys - 1) / kTileKeys);
    rows.reset();
    for (int tile = 0; tile < tiles; ++tile) {
      const int begin = tile * kTileKeys;
      const int left = unit.keys - begin;
      const bool active = begin < own_most;
      ptx::copy_async_wait_all();
      __syncthreads();  // k is there, and q with the first; v is free
      copy_keys<T, kDim>(v, p.input.v, unit.head, std::int64_t{unit.key_begin} + begin, left, p.head_dim);
      if (tile + 3 >= tiles) units.advance();
      if (active) {
        rows.score(q_lane, k_lane, p.head_dim);
        if (cancel) rows.cancel_scores();
        if (begin + kTileKeys > least) rows.mask(limits + lane_row, begin);
      }
      if (tile + 1 == tiles) units.finish();
      ptx::copy_async_wait_all();
      __syncthreads();  // v is there; k is free, and q behind the last
      if (tile + 1 < tiles) {
        copy_keys<T, kDim>(k, p.input.k, unit.head, std::int64_t{unit.key_begin} + begin + kTileKeys, left - kTileKeys,
                           p.head_dim);
      } else {
        copy_next_unit();
      }
      if (active) rows.weigh(c);
      if (unit.masked > 0 && begin + kTileKeys > least && least < unit.keys) {
        separate_nonfinite<T, kDim>(rows, shared.v, limits + lane_row, begin, max(0, least - begin),
                                    min(left, kTileKeys));
      }
      if (active) rows.add_values(v_lane, p.head_dim);
    }
    rows.store(p, unit, first_row, c);
  }
  ptx::copy_async_wait_all();
}

template <class T, int kDim>
void launch_attend(const Shape& shape, const Arguments& arguments, cudaStream_t stream) {
  launch(attend_kernel<T, kDim>, dim3(static_cast<unsigned>(shape.sm_count * kCtasPerSm)), kThreads,
         sizeof(typename Tiles<T, kDim>::Shared), stream, arguments);
}

template <class T>
void launch_attend(const Shape& shape, const Arguments& arguments, cudaStream_t stream) {
  if (shape.head_dim <= 64) {
    launch_attend<T, 64>(shape, arguments, stream);
  } else if (shape.head_dim <= 128) {
    launch_attend<T, 128>(shape, arguments, stream);
  } else {
    launch_attend<T, 256>(shape, arguments, stream);
  }
}

}  // namespace

int portable_rows(int head_dim) { return head_dim <= 128 ? 128 : 64; }

void attend_portable(const Shape& shape, const AttendInput& input, const UnitList& units, const AttendOutput& output,
                     cudaStream_t stream) {
  if (shape.total_q == 0 || shape.total_k == 0) return;
  const bool tickets = input.rows == nullptr || shape.block_size > kShortUnitKeys;
  const Arguments arguments{input,          output,      units,
                            shape.head_dim, shape.group, static_cast<float>(shape.scale * std::numbers::log2e),
                            tickets};
  if (shape.dtype == DType::bf16) {
    launch_attend<__nv_bfloat16>(shape, arguments, stream);
  } else {
    launch_attend<__half>(shape, arguments, stream);
  }
}

}  // namespace moba::cuda
