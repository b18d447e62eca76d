// What a plan settles for backward: how much of the work is done at a time, and the memory of that.
#include <algorithm>
#include <cstdint>
#include <optional>

#include "cuda/setup.h"

namespace moba::cuda {
namespace {

constexpr std::size_t kSlabScratch = std::size_t{1} << 30;   // beside the sums over slabs of tokens; at most twice that
constexpr std::int64_t kMostLists = 1 << 24;                 // of a key head, parts counted
constexpr std::size_t kSmallDense = std::size_t{256} << 20;  // dense_backward may have so much, or what backward takes

// What is done at a time: parts of every block for some rows. Tokens and parts are all there are, or part of them.
struct Portion {
  std::int64_t heads, tokens, parts;
};

// Heads whose rows of q and dout fit in L2 together: 16 MB each for 64K rows of d = 128, of 60 MB on an H200. Only the
// last section has to end evenly; before it a unit may take as long as two sections, and large ones have fewer sums to
// store and to add up.
Sections sections_of(const Shape& s, const BackwardSetup& backward) {
  constexpr std::int64_t kSectionBytes = std::int64_t{34} << 20;
  const std::int64_t head_rows = std::int64_t{backward.slab_tokens} * s.group;
  const std::int64_t heads = std::clamp<std::int64_t>(
      kSectionBytes / std::max<std::int64_t>(1, 4 * head_rows * s.head_dim), 1, backward.slab_heads);
  const std::int64_t lists_of_row = std::int64_t{backward.parts} * (backward.dense ? 1 : s.slots);
  const std::int64_t rows_per_sm = heads * head_rows * lists_of_row / s.sm_count;
  const auto unit_rows = [](std::int64_t rows, std::int64_t most) {
    return static_cast<int>(std::clamp<std::int64_t>(rows, 1024, most) / 64 * 64);
  };
  return {static_cast<int>(heads), unit_rows(2 * rows_per_sm, 8192),
          unit_rows(rows_per_sm / 2, backward.last_most_rows)};
}

void take(BackwardSetup& backward, const Shape& shape, const Portion& portion) {
  backward.slab_heads = static_cast<int>(portion.heads);
  backward.slab_tokens = static_cast<int>(portion.tokens);
  backward.parts = static_cast<int>(portion.parts);
  backward.sections = sections_of(shape, backward);
}

std::size_t bytes_of(const Setup& setup, BackwardSetup backward, const Portion& portion) {
  take(backward, setup.shape, portion);
  Carver carver;
  BatchMemory(carver, setup.shape);
  RopeMemory(carver, setup);
  BackwardMemory(carver, setup, backward);
  return carver.used();
}

// Tokens of a slab that is worth it: lists of a tile of rows on average, or each unit would load its keys for nothing.
std::int64_t least_tokens(const Shape& s, const BackwardSetup& backward) {
  constexpr std::int64_t kRows = 64;
  const std::int64_t rows = backward.dense ? 16 * kRows : kRows * s.max_blocks / s.slots;
  return std::max<std::int64_t>(1, rows / s.group);
}

// Chooses how much is done at a time: as much as `limit` allows, in about equal portions.
class Choice {
 public:
  Choice(const Setup& setup, const BackwardSetup& backward, std::size_t limit, bool is_callers)
      : setup_(setup), backward_(backward), limit_(limit), is_callers_(is_callers) {}

  Portion choose() const {
    if (const auto heads = whole_heads()) return *heads;
    if (const auto parts = parts_of_a_head()) return *parts;
    return tokens_of_a_head();
  }
  std::size_t bytes(const Portion& portion) const { return bytes_of(setup_, backward_, portion); }

 private:
  std::optional<Portion> whole_heads() const {
    const std::int64_t heads = shape_.kv_heads;
    const auto most = largest(heads, [&](std::int64_t n) { return fits({n, tokens_, parts_}); });
    if (most == 0) return {};
    return evenly(heads, most, [&](std::int64_t n) { return Portion{n, tokens_, parts_}; });
  }
  std::optional<Portion> parts_of_a_head() const {
    const auto most = largest(parts_, [&](std::int64_t n) { return fits({1, tokens_, n}); });
    if (most == 0) return {};
    return evenly(parts_, most, [&](std::int64_t n) { return Portion{1, tokens_, n}; });
  }
  // Some tokens and one part of each block: sums over slabs are kept then. Where the limit is not the caller's they are
  // beyond it, and small slabs grow.
  Portion tokens_of_a_head() const {
    const std::size_t totals =
        std::size_t{8} * static_cast<std::size_t>(shape_.total_k) * static_cast<std::size_t>(shape_.head_dim);
    const auto steps_of = [&](std::int64_t n) { return Portion{1, std::min(tokens_, n * kTokenStep), 1}; };
    const auto most_within = [&](std::int64_t steps, std::size_t limit) {
      return std::max<std::int64_t>(1, largest(steps, [&](std::int64_t n) { return bytes(steps_of(n)) <= limit; }));
    };
    const std::int64_t steps = ceil_div(tokens_, kTokenStep);
    const std::size_t limit = is_callers_ ? limit_ : std::max(limit_, totals + kSlabScratch);
    Portion some = evenly(steps, most_within(steps, limit), steps_of);
    if (!is_callers_) {
      const std::int64_t worth = std::min(steps, ceil_div(least_tokens(shape_, backward_), kTokenStep));
      some.tokens = std::max(some.tokens, steps_of(most_within(worth, totals + 2 * kSlabScratch)).tokens);
    }
    const Portion all{1, tokens_, 1};
    return bytes(some) < bytes(all) ? some : all;  // the sums may take more than slabs save
  }

  bool fits(const Portion& portion) const {
    const std::int64_t lists = std::max(1, backward_.dense ? shape_.batch : shape_.max_blocks);
    return lists * portion.parts <= kMostLists && bytes(portion) <= limit_;
  }
  // portion(n) for the smallest n that takes `all` in as few portions as `most` does, or, where that needs more memory
  // (less work may be cut finer), portion(most).
  template <class F>
  Portion evenly(std::int64_t all, std::int64_t most, const F& portion) const {
    const Portion even = portion(ceil_div(all, ceil_div(all, most))), large = portion(most);
    return bytes(even) <= bytes(large) ? even : large;
  }

  const Setup& setup_;
  const BackwardSetup& backward_;
  std::size_t limit_;
  bool is_callers_;
  const Shape& shape_ = setup_.shape;
  std::int64_t tokens_ = std::max(1, shape_.total_q), parts_ = backward_.all_parts;
};

// Returns the bytes it takes.
std::size_t choose_portions(const Setup& setup, BackwardSetup& backward, std::size_t limit, bool is_callers) {
  const Choice choice(setup, backward, limit, is_callers);
  const Portion chosen = choice.choose();
  const std::size_t bytes = choice.bytes(chosen);
  take(backward, setup.shape, chosen);
  return bytes;
}

}  // namespace

BackwardMemory::BackwardMemory(Carver& carver, const Setup& setup, const BackwardSetup& backward) {
  const Shape& s = setup.shape;
  const Slab slab = backward.slab();
  const Pass pass = backward.pass();
  const std::int64_t rows = std::int64_t{slab.heads} * slab.tokens * s.group;
  const std::int64_t entries = backward.dense ? rows : rows * s.slots;
  if (!backward.dense) {
    index.offsets = carver.take<std::int64_t>(std::int64_t{slab.heads} * s.max_blocks + 1);
    index.rows = carver.take<std::int32_t>(entries);
    index.positions = carver.take<std::int32_t>(entries);
    index_scratch = carver.take<std::byte>(static_cast<std::int64_t>(index_scratch_bytes(s, slab)));
  }
  units.units = carver.take<Unit>(backward.dense ? dense_backward_unit_capacity(s, slab, pass)
                                                 : backward_unit_capacity(s, slab, pass));
  units.counters = carver.take<std::int32_t>(2);
  const ShareCapacity most = backward.dense ? dense_share_capacity(s, slab, pass) : share_capacity(s, slab, pass);
  share_list.splits = carver.take<Split>(most.splits);
  share_list.counters = carver.take<std::int32_t>(2);
  shares = carver.take<float>(most.shares * 2 * backward.part_keys * s.head_dim);
  if (setup.backward == BackwardKernel::sm90) {
    values.terms = carver.take<uint4>(row_value_count(s, slab));
  } else {
    values.lse = carver.take<float>(row_value_count(s, slab));
    values.delta = carver.take<float>(row_value_count(s, slab));
  }
  part_stride = entries;
  dq = carver.take<std::uint16_t>(entries * backward.parts * s.head_dim);
  if (backward.parts < backward.all_parts) query_totals = carver.take<float>(rows * s.head_dim);
  if (backward.sums_keys(s)) {
    key_totals.dk = carver.take<float>(std::int64_t{s.total_k} * s.head_dim);
    key_totals.dv = carver.take<float>(std::int64_t{s.total_k} * s.head_dim);
  }
}

std::size_t prepare_backward(Setup& setup, const Plan::Impl& plan, std::size_t limit) {
  const bool is_callers = plan.options.workspace_limit > 0, sm90 = setup.backward == BackwardKernel::sm90;
  const Shape& s = setup.shape;
  const std::int64_t longest = std::max<std::int64_t>(1, plan.problem.max_seqlen_k);
  BackwardSetup& chosen = setup.chosen_backward;
  BackwardSetup& dense = setup.dense_backward;
  chosen.part_keys = dense.part_keys = sm90 ? kSm90PartKeys : portable_part_keys(s.head_dim);
  // As many keys as the kernel has room for, but of short blocks not twice what they have.
  if (!sm90 && s.block_size <= 64) chosen.part_keys = std::min(chosen.part_keys, 64);
  // Two CTAs of the portable kernel share a multiprocessor: a row takes each of them twice as long.
  chosen.last_most_rows = dense.last_most_rows = sm90 ? 4096 : 2048;
  chosen.all_parts =
      static_cast<int>(ceil_div(std::min<std::int64_t>(s.block_size, longest), std::int64_t{chosen.part_keys}));
  dense.all_parts = static_cast<int>(ceil_div(longest, std::int64_t{dense.part_keys}));
  dense.dense = true;
  // The memory is for either; a plan that is made for the one is not to pay for the other.
  const std::size_t bytes = choose_portions(setup, chosen, limit, is_callers);
  return std::max(bytes, choose_portions(setup, dense, std::min(limit, std::max(bytes, kSmallDense)), is_callers));
}

}  // namespace moba::cuda
