// The sequences of a decode call that are split over their blocks together (decode.cc).
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "cpu/cache.h"

namespace moba::cpu {

struct SplitCall {
  const CacheCall& call;
  const Plan::Impl& plan;
  const ConstTensor q;
  const DecodeOutputs outputs;
  const SplitSizes sizes;
  const std::int64_t wanted;  // blocks to choose by score, beside the own one
  const float scale;          // of the scores, log2(e) in it
  SplitMemory memory;
  std::byte* scratch_memory;
  std::size_t scratch_bytes;  // per thread
  std::vector<SplitGroup> groups;

  SplitCall(const CacheCall& call, const ConstTensor& q, const DecodeOutputs& outputs);

  bool fits(const CachedSequence& s) const;
  void add(const CachedSequence& s);
  void clear();

  SplitScratch scratch(int slot) const;

  // Of the rows of a group, token * g + head.
  std::int64_t rows(const SplitGroup& group) const { return group.sequence->q_len * plan.group; }
  std::int64_t position(const SplitGroup& group, std::int64_t row) const {
    return group.sequence->first_position() + row / plan.group;
  }
  // Blocks before the own one.
  std::int64_t candidates(const SplitGroup& group, std::int64_t row) const {
    return position(group, row) / plan.problem.config.block_size;
  }
  bool must_choose(std::int64_t blocks) const { return wanted > 0 && blocks > wanted; }

  // Of group `number`.
  std::int32_t* block_starts(const SplitGroup& group, std::int64_t number) const {
    return memory.block_starts + group.choice + number;
  }
  std::int64_t partial(const SplitGroup& group, std::int64_t row, std::int64_t slot, std::int64_t piece) const {
    return (group.row + row) * sizes.units + slot * sizes.pieces + piece;
  }
  // Where the caller wants them.
  void write_ids(const SplitGroup& group, std::int64_t row, std::span<const std::int32_t> ids) const;
};

}  // namespace moba::cpu
