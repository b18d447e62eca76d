// The k best of the blocks that a row has scores for.
// Included once per target by way of hwy/foreach_target.h, hence the toggled guard.
#if defined(MOBA_CPU_BEST_BLOCKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_BEST_BLOCKS_INL_H_
#undef MOBA_CPU_BEST_BLOCKS_INL_H_
#else
#define MOBA_CPU_BEST_BLOCKS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {

// Turns scores[0..n) into integers of the same order, in place: -inf .. +inf ascending, -0 equal to +0, NaN below all;
// kLowest follows up to a whole vector. Returns the maximum of each lane.
constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min();
HWY_INLINE hn::Vec<I32> order_scores(float* scores, std::int64_t n) {
  const F32 df;
  const I32 di;
  const auto lowest = hn::Set(di, kLowest);
  auto maxima = lowest;
  for (std::int64_t j = 0; j < n; j += kLanes) {
    const VF s = hn::Add(hn::LoadU(df, scores + j), hn::Zero(df));
    const auto bits = hn::BitCast(di, s);
    auto ordered = hn::Xor(bits, hn::And(hn::BroadcastSignBit(bits), hn::Set(di, 0x7fffffff)));
    ordered = hn::IfThenElse(hn::RebindMask(di, hn::IsNaN(s)), lowest, ordered);
    if (n - j < kLanes) ordered = hn::IfThenElse(hn::FirstN(di, static_cast<std::size_t>(n - j)), ordered, lowest);
    maxima = hn::Max(maxima, ordered);
    hn::StoreU(hn::BitCast(df, ordered), df, scores + j);
  }
  return maxima;
}

// The `rank`-th largest of the lanes: the least of those that fewer than `rank` lanes exceed.
HWY_INLINE std::int32_t ranked_lane(hn::Vec<I32> lanes, std::int64_t rank) {
  const I32 di;
  alignas(64) std::int32_t each[kLanes];
  hn::Store(lanes, di, each);
  auto greater = hn::Zero(di);
  for (const std::int32_t lane : each)
    greater = hn::Sub(greater, hn::VecFromMask(di, hn::Gt(hn::Set(di, lane), lanes)));
  const auto ranked = hn::Lt(greater, hn::Set(di, static_cast<std::int32_t>(rank)));
  return hn::GetLane(
      hn::MinOfLanes(di, hn::IfThenElse(ranked, lanes, hn::Set(di, std::numeric_limits<std::int32_t>::max()))));
}

// The best `capacity` blocks of those offered so far, ascending. An entry is one integer, the ordered score above the
// block, so that among equal scores the more recent block is the greater.
class BestBlocks {
 public:
  BestBlocks() = default;
  BestBlocks(std::int64_t* list, std::int64_t capacity) : list_(list), capacity_(capacity) {}

  // Offers blocks first .. first + n, all older than those offered before. Overwrites the scores. `spare` has room for
  // 2 (n + capacity) entries.
  void offer(float* scores, std::int64_t first, std::int64_t n, std::int64_t* spare) {
    const hn::Vec<I32> maxima = order_scores(scores, n);
    std::int32_t bar = kLowest;  // scores below it need not be looked at
    if (size_ == capacity_) {
      // Older than what is listed, so an equal score does not do.
      bar = static_cast<std::int32_t>(least_ >> 32) + 1;
    } else if (size_ == 0 && capacity_ <= kLanes) {
      bar = ranked_lane(maxima, capacity_);  // so many lanes hold a score as high as this
    }
    const std::int64_t found = collect(scores, first, n, bar, spare);
    if (found > 0) add(spare, found);
  }

  // The blocks listed, ascending, to ids; returns how many.
  std::int64_t blocks(std::int32_t* ids) const {
    for (std::int64_t j = 0; j < size_; ++j) ids[j] = static_cast<std::int32_t>(list_[j] & 0xffffffff);
    return size_;
  }

 private:
  static std::int64_t collect(const float* ordered, std::int64_t first, std::int64_t n, std::int32_t bar,
                              std::int64_t* to) {
    const F32 df;
    const I32 di;
    std::int64_t found = 0;
    for (std::int64_t j = 0; j < n; j += kLanes) {
      const auto high = hn::Not(hn::Lt(hn::BitCast(di, hn::LoadU(df, ordered + j)), hn::Set(di, bar)));
      std::uint8_t bytes[8] = {};
      hn::StoreMaskBits(di, high, bytes);
      std::uint64_t bits;
      std::memcpy(&bits, bytes, sizeof(bits));
      if (n - j < kLanes) bits &= (std::uint64_t{1} << (n - j)) - 1;
      for (; bits != 0; bits &= bits - 1) {
        const std::int64_t i = j + std::countr_zero(bits);
        std::int32_t score;
        std::memcpy(&score, ordered + i, sizeof(score));
        to[found++] = static_cast<std::int64_t>(score) * (std::int64_t{1} << 32) + (first + i);
      }
    }
    return found;
  }

  // Puts entries[0..found) before the list and drops the least of all until `capacity` are left.
  void add(std::int64_t* entries, std::int64_t found) {
    std::int64_t* end = std::copy_n(list_, size_, entries + found);
    if (end - entries > capacity_ + kFew) {
      std::int64_t* sorted = end;
      std::int64_t* sorted_end = std::copy(entries, end, sorted);
      std::int64_t* least = sorted_end - capacity_;
      std::nth_element(sorted, least, sorted_end);
      end = std::remove_if(entries, end, [bar = *least](std::int64_t entry) { return entry < bar; });
    }
    while (end - entries > capacity_) {
      std::int64_t* least = std::min_element(entries, end);
      end = std::copy(least + 1, end, least);
    }
    size_ = std::copy(entries, end, list_) - list_;
    if (size_ == capacity_) least_ = *std::min_element(list_, list_ + size_);
  }

  static constexpr std::int64_t kFew = 8;  // so many are dropped one by one

  std::int64_t* list_ = nullptr;
  std::int64_t capacity_ = 0, size_ = 0;
  std::int64_t least_ = 0;  // of a full list
};

}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
