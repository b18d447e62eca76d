// pool: the mean key of each block, in the order of summation that docs/spec.md fixes.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/pool.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>

#include "call.h"
#include "cpu/lanes-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/targets.h"
#include "cpu/workers.h"
#include "parallel.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

inline void add(float* HWY_RESTRICT to, const float* HWY_RESTRICT from, std::int64_t n) {
  const F32 df;
  for (std::int64_t i = 0; i < n; i += kLanes)
    hn::StoreU(hn::Add(hn::Load(df, to + i), hn::Load(df, from + i)), df, to + i);
}

// Centroid of keys [begin, begin + keys) of one head: groups of 64 keys are summed, then the sums of the groups.
void PoolBlock(const ConstTensor& k, const KeyPages& pages, std::int64_t head, std::int64_t begin, std::int64_t keys,
               void* centroid) {
  constexpr std::int64_t kGroup = 64;
  const HeadRows rows = HeadOf(k, head, pages);
  const std::int64_t dim = k.shape[2], padded = RoundUp(dim, kLanes);
  alignas(64) float row[256] = {}, group[256] = {}, total[256] = {};  // the longest head dim
  for (std::int64_t first = 0; first < keys; first += kGroup) {
    float* sum = first == 0 ? total : group;
    Widen(k.dtype, rows.row(begin + first), sum, dim);
    for (std::int64_t j = first + 1; j < std::min(keys, first + kGroup); ++j) {
      Widen(k.dtype, rows.row(begin + j), row, dim);
      add(sum, row, padded);
    }
    if (first != 0) add(total, group, padded);
  }
  const VF length = hn::Set(F32(), static_cast<float>(keys));
  for (std::int64_t i = 0; i < padded; i += kLanes)
    hn::Store(hn::Div(hn::Load(F32(), total + i), length), F32(), total + i);
  Narrow(k.dtype, total, centroid, dim);
}

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::cpu {

HWY_EXPORT(PoolBlock);

void pool_block(const Plan::Impl& plan, const ConstTensor& k, const KeyPages& pages, std::int64_t head,
                std::int64_t begin, std::int64_t keys, std::byte* centroid) {
  MOBA_KERNEL(PoolBlock, plan.cpu_target)(k, pages, head, begin, keys, centroid);
}

void pool(const Call& call, const Tensor& centroids) {
  const std::int64_t heads = call.plan.problem.kv_heads, block_size = call.plan.problem.config.block_size;
  const std::int64_t blocks =
      call.sequences.empty() ? 0 : call.sequences.back().block_begin + call.sequences.back().blocks;
  const std::int64_t per_task = ceil_div(4096, std::min<std::int64_t>(block_size, 4096));  // about 4096 keys
  const auto pool_block = MOBA_KERNEL(PoolBlock, call.plan.cpu_target);
  parallel_for(call.plan.threads, ceil_div(blocks, per_task) * heads, [&](std::int64_t task, int) {
    const std::int64_t head = task % heads, first = task / heads * per_task, last = std::min(blocks, first + per_task);
    auto s = std::ranges::partition_point(call.sequences,
                                          [&](const Sequence& q) { return q.block_begin + q.blocks <= first; });
    for (std::int64_t block = first; block < last; ++block) {
      while (s->block_begin + s->blocks <= block) ++s;
      const std::int64_t start = (block - s->block_begin) * block_size;
      const std::int64_t keys = std::min(block_size, s->k_len - start);
      pool_block(call.k, {}, head, s->k_begin + start, keys, head_row(centroids, block, head));
    }
  });
}

}  // namespace moba::cpu
#endif
