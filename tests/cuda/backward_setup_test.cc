// What a plan of the cuda backend settles for backward: how much is done at a time, how lists of rows are cut, and the
// memory of that.
#include <algorithm>

#include "planned.h"

namespace moba::test {
namespace {

using cuda::BackwardSetup;
using cuda::DeviceLimits;
using cuda::Pass;
using cuda::Sections;
using cuda::Shape;
using cuda::ShareCapacity;
using cuda::Slab;

// The portable kernel holds as many keys as it has room for, and no more than a short block has.
TEST(CudaBackwardSetup, PartsFollowTheKernelAndTheBlocks) {
  struct Row {
    std::string family;
    std::int64_t head_dim, block_size;
    int chosen, dense;
  };
  const std::vector<Row> rows{
      {"sm90", 64, 64, 128, 128},     {"sm90", 128, 512, 128, 128},   {"portable", 32, 64, 64, 128},
      {"portable", 64, 16, 64, 128},  {"portable", 64, 80, 128, 128}, {"portable", 128, 64, 64, 64},
      {"portable", 128, 512, 64, 64}, {"portable", 192, 64, 32, 32},  {"portable", 256, 512, 32, 32},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(::testing::Message() << "row " << &row - rows.data());
    const Config config{.block_size = row.block_size, .top_k = 4};
    const Plan::Impl plan = planned(problem_of(50000, 8, 2, row.head_dim, config), kH200, row.family);
    EXPECT_EQ(plan.cuda->chosen_backward.part_keys, row.chosen);
    EXPECT_EQ(plan.cuda->dense_backward.part_keys, row.dense);
  }
}

TEST(CudaBackwardSetup, TakesAsMuchAsItsInputs) {
  const auto scratch = [](std::int64_t tokens) {
    return backward_workspace_of(planned(problem_of(tokens, 16, 16, 128, {.block_size = 128, .top_k = 8}), kH200));
  };
  const auto inputs = [](std::int64_t tokens) { return static_cast<std::size_t>(tokens) * 16 * 128 * 2 * 4; };
  EXPECT_LE(scratch(65536), 1409 * kMiB);
  EXPECT_LE(scratch(98304), inputs(98304) + kMiB);
  EXPECT_GT(scratch(131072), 1409 * kMiB);
  EXPECT_LE(scratch(262144), 2049 * kMiB);
}

// What training takes beyond tensors, of a problem of the size that is trained on.
TEST(CudaBackwardSetup, TrainingIsModest) {
  for (const std::int64_t kv_heads : {16, 4}) {
    const Problem problem = problem_of(1 << 16, 16, kv_heads, 128, {.block_size = 128, .top_k = 8});
    const std::size_t selection = Plan(problem, {.threads = 1}).selection_bytes();
    for (const DeviceLimits& device : {kH200, kA100}) {
      const Plan::Impl plan = planned(problem, device);
      EXPECT_LE(selection + std::max(workspace_of(plan), backward_workspace_of(plan)), 1536 * kMiB)
          << device.name << ", " << kv_heads << " key heads: forward " << workspace_of(plan) << ", backward "
          << backward_workspace_of(plan) << ", selection " << selection;
    }
  }
}

// Whatever the problem is, backward has memory to work in.
TEST(CudaBackwardSetup, AlwaysHasAWorkspace) {
  for (const std::int64_t tokens : {0, 1, 127, 4096}) {
    for (const std::int64_t head_dim : {32, 64, 96, 128, 192, 256}) {
      for (const std::int64_t block_size : {16, 128, 8192}) {
        const Problem problem = problem_of(tokens, 8, 2, head_dim, {.block_size = block_size, .top_k = 4});
        for (const DeviceLimits& device : {kH200, kA100, kB200, kRtx}) {
          const Plan::Impl plan = planned(problem, device);
          EXPECT_GT(backward_workspace_of(plan), kAlignment);
          EXPECT_LE(backward_workspace_of(plan), 2049 * kMiB);
        }
      }
    }
  }
}

// Limits that would do for forward are kept by backward too, or it says which would do.
TEST(CudaBackwardSetup, KeepsALimitOrSaysWhatItNeeds) {
  for (const std::int64_t tokens : {1000, 1 << 16, 1 << 20}) {
    for (const DeviceLimits& device : {kH200, kA100}) {
      const Problem problem = problem_of(tokens, 16, 2, 128, {.block_size = 512, .top_k = 8});
      for (std::size_t asked = kMiB / 4; asked <= 4096 * kMiB; asked *= 2) {
        const std::size_t limit = granted(problem, device, asked);
        const Plan::Impl plan = planned(problem, device, "", limit);
        const std::size_t needed = plan.backward_workspace_limit;
        if (needed == 0) {
          EXPECT_LE(backward_workspace_of(plan), limit) << tokens;
          continue;
        }
        EXPECT_GT(needed, limit);
        EXPECT_EQ(backward_workspace_of(plan), needed);
        const Plan::Impl enough = planned(problem, device, "", needed);
        EXPECT_EQ(enough.backward_workspace_limit, 0U);
        EXPECT_LE(backward_workspace_of(enough), needed) << tokens << ", limit " << limit;
      }
    }
  }
}

// More memory is never too little.
TEST(CudaBackwardSetup, KeepsEveryLimitAboveOneThatItKeeps) {
  const Problem problem = problem_of(1 << 17, 16, 4, 128, {.block_size = 64, .top_k = 8});
  std::size_t kept = 0;
  for (std::size_t limit = 290 * kMiB; limit < 340 * kMiB; limit += kMiB / 16) {
    const Plan::Impl plan = planned(problem, kH200, "", limit);
    if (plan.backward_workspace_limit == 0) {
      kept = limit;
    } else {
      EXPECT_EQ(kept, 0U) << "refused with " << limit << ", which is more";
    }
  }
  EXPECT_GT(kept, 0U);
}

// Each slab of tokens has many rows for each block: with few, units would load keys for next to nothing.
TEST(CudaBackwardSetup, LongSequencesTakeLargeSlabs) {
  for (const Problem& problem : {problem_of(1'500'000, 16, 16, 128, {.block_size = 128, .top_k = 8}),
                                 problem_of(1'500'000, 32, 8, 128, {.block_size = 128, .top_k = 8}),
                                 problem_of(10'000'000, 1, 1, 128, {.block_size = 4096, .top_k = 12})}) {
    const Plan::Impl plan = planned(problem, kH200);
    const BackwardSetup& backward = plan.cuda->chosen_backward;
    const std::int64_t rows = std::int64_t{backward.slab_tokens} * plan.group * plan.slots;
    EXPECT_GE(rows, 64 * plan.max_blocks) << problem.total_q << " tokens, slabs of " << backward.slab_tokens;
    EXPECT_LE(backward_workspace_of(plan), key_sums(problem) + 1536 * kMiB);
  }
}

// The last slab of a call may have fewer heads, tokens or parts than the memory was made for.
TEST(CudaBackwardSetup, PartsOfASlabHaveNoMoreUnitsThanTheSlab) {
  for (const std::int64_t tokens : {1 << 10, 5000, 1 << 16}) {
    const Problem problem = problem_of(tokens, 28, 7, 128, {.block_size = 256, .top_k = 8});
    const Plan::Impl plan = planned(problem, kH200);
    const Shape& shape = plan.cuda->shape;
    const BackwardSetup& backward = plan.cuda->chosen_backward;
    const Slab whole = backward.slab();
    const Pass all = backward.pass();
    for (int heads = 1; heads <= whole.heads; ++heads) {
      for (int left = 1; left <= whole.tokens; left += 1 + left / 2) {
        for (int parts = 1; parts <= all.parts; ++parts) {
          const Slab slab{0, heads, 0, left};
          const Pass pass{all.sections, all.part_keys, 0, parts};
          EXPECT_LE(cuda::backward_unit_capacity(shape, slab, pass), cuda::backward_unit_capacity(shape, whole, all));
          EXPECT_LE(cuda::dense_backward_unit_capacity(shape, slab, pass),
                    cuda::dense_backward_unit_capacity(shape, whole, all));
          for (const auto capacity : {cuda::share_capacity, cuda::dense_share_capacity}) {
            EXPECT_LE(capacity(shape, slab, pass).shares, capacity(shape, whole, all).shares);
            EXPECT_LE(capacity(shape, slab, pass).splits, capacity(shape, whole, all).splits);
          }
        }
      }
    }
  }
}

// What is counted of lists that are cut as Sections says: units that are one of several of their list, and such lists.
ShareCapacity count_shares(const std::vector<std::int64_t>& lists, std::int64_t most_rows) {
  ShareCapacity count{};
  for (const std::int64_t rows : lists) {
    if (rows <= most_rows) continue;
    const std::int64_t pieces = ceil_div(rows, most_rows);
    const std::int64_t step = ceil_div(ceil_div(rows, pieces), 64) * 64;  // whole tiles
    count.shares += ceil_div(rows, step);
    ++count.splits;
  }
  return count;
}

// Rows of a slab's head, each in `slots` of the lists: all in the first ones, evenly over all, or at random.
std::vector<std::vector<std::int64_t>> ways_to_choose(std::int64_t rows, std::int64_t slots, std::int64_t lists) {
  std::vector<std::vector<std::int64_t>> ways(2, std::vector<std::int64_t>(lists));
  for (std::int64_t i = 0; i < lists; ++i) {
    ways[0][i] = i < slots ? rows : 0;
    ways[1][i] = rows * slots / lists;
  }
  Random random(static_cast<std::uint64_t>(rows));
  for (int draw = 0; draw < 20; ++draw) {
    std::int64_t left = rows * slots;
    std::vector<std::int64_t> way(lists);
    for (std::int64_t& list : way) left -= list = std::min({left, rows, random.integer(0, 2 * rows * slots / lists)});
    ways.push_back(way);
  }
  return ways;
}

// Units are whole tiles of rows, not so short that each loads its keys for little. The heads of a section fit in the
// cache together, or are one.
void expect_sections(const Plan::Impl& plan) {
  const BackwardSetup& backward = plan.cuda->chosen_backward;
  const Sections& sections = backward.sections;
  const std::int64_t head_rows = std::int64_t{backward.slab_tokens} * plan.group;
  const std::int64_t bytes = sections.heads * head_rows * plan.problem.head_dim * 4;  // of q and dout
  EXPECT_GE(sections.heads, 1);
  EXPECT_LE(sections.heads, backward.slab_heads);
  EXPECT_TRUE(sections.heads == 1 || bytes <= std::int64_t{34 * kMiB}) << sections.heads;
  for (const auto& [rows, most] :
       {std::pair{sections.most_rows, 8192}, {sections.last_most_rows, backward.last_most_rows}}) {
    EXPECT_EQ(rows % 64, 0);
    EXPECT_GE(rows, 1024);
    EXPECT_LE(rows, most);
  }
  EXPECT_LE(sections.last_most_rows, sections.most_rows);
}

// What units of cut lists leave to be added up has its memory, whatever rows choose.
void expect_room_for_shares(const Plan::Impl& plan) {
  const BackwardSetup& backward = plan.cuda->chosen_backward;
  const Shape& shape = plan.cuda->shape;
  const Slab slab = backward.slab();
  const Pass pass = backward.pass();
  const ShareCapacity room = cuda::share_capacity(shape, slab, pass);
  const std::int64_t last = (slab.heads - 1) % pass.sections.heads + 1, before = slab.heads - last;  // heads
  for (const auto& lists : ways_to_choose(std::int64_t{slab.tokens} * shape.group, shape.slots, shape.max_blocks)) {
    const ShareCapacity early = count_shares(lists, pass.sections.most_rows);
    const ShareCapacity late = count_shares(lists, pass.sections.last_most_rows);
    EXPECT_LE(pass.parts * (before * early.shares + last * late.shares), room.shares);
    EXPECT_LE(pass.parts * (before * early.splits + last * late.splits), room.splits);
  }
}

TEST(CudaBackwardSetup, SectionsOfHeadsAndTheSharesOfTheirUnits) {
  for (const std::int64_t tokens : {1, 1000, 5000, 1 << 16, 1 << 20}) {
    for (const auto& [q_heads, kv_heads] : {std::pair{16, 16}, {16, 2}, {28, 7}, {1, 1}}) {
      for (const std::int64_t block_size : {64, 512}) {
        const Problem problem = problem_of(tokens, q_heads, kv_heads, 128, {.block_size = block_size, .top_k = 8});
        for (const DeviceLimits& device : {kH200, kA100}) {
          SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << q_heads << " on " << kv_heads << ", "
                                            << device.name << ", blocks of " << block_size);
          const Plan::Impl plan = planned(problem, device);
          expect_sections(plan);
          expect_room_for_shares(plan);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
