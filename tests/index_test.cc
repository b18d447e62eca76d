// index: the transpose of a selection, against the reference and against a count by hand.
#include <algorithm>
#include <map>

#include "support.h"

namespace moba::test {
namespace {

void expect_transpose(const Case& c, Chosen& chosen, std::int64_t max_blocks) {
  const std::int64_t group = c.q_heads / c.kv_heads, per_row = c.q_heads / chosen.ids.dim(1);
  std::map<std::int64_t, std::vector<std::int32_t>> lists;
  std::int64_t first_block = 0, token = 0;
  for (std::size_t s = 0; s < c.q_lengths.size(); ++s) {
    for (std::int64_t i = 0; i < c.q_lengths[s]; ++i, ++token) {
      for (std::int64_t head = 0; head < c.q_heads; ++head) {
        for (const std::int32_t id : chosen.row(token, head / per_row)) {
          lists[head / group * max_blocks + first_block + id].push_back(
              static_cast<std::int32_t>(token * group + head % group));
        }
      }
      for (std::int64_t head = 0; head < chosen.ids.dim(1); ++head) {
        ASSERT_EQ(chosen.counts.as<std::int32_t>(token, head), std::ssize(chosen.row(token, head)));
      }
    }
    first_block += (c.k_lengths[s] + c.config.block_size - 1) / c.config.block_size;
  }
  std::int64_t total = 0;
  for (std::int64_t list = 0; list < c.kv_heads * max_blocks; ++list) {
    ASSERT_EQ(chosen.offsets.as<std::int64_t>(list), total) << "list " << list;
    std::ranges::sort(lists[list]);
    for (const std::int32_t row : lists[list]) ASSERT_EQ(chosen.rows.as<std::int32_t>(total++), row) << "list " << list;
  }
  ASSERT_EQ(chosen.offsets.as<std::int64_t>(c.kv_heads * max_blocks), total);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const std::int64_t block_size : {1, 5, 64}) {
    all.push_back({.name = "heads",
                   .q_heads = 6,
                   .kv_heads = 2,
                   .q_lengths = {300},
                   .k_lengths = {290},
                   .config = {.block_size = block_size, .top_k = 4}});
    all.push_back({.name = "no group",
                   .q_heads = 3,
                   .kv_heads = 3,
                   .q_lengths = {70},
                   .k_lengths = {700},
                   .config = {.block_size = block_size, .top_k = 9}});
    all.push_back({.name = "packed",
                   .q_heads = 8,
                   .kv_heads = 2,
                   .q_lengths = {0, 1, 300, 9, 0, 500, 64},
                   .k_lengths = {9, 1, 300, 0, 0, 100, 200},
                   .config = {.block_size = block_size, .top_k = 3},
                   .outputs = {.gap = 2, .swapped = true, .offset = 1}});
    all.push_back({.name = "many tokens",
                   .q_heads = 2,
                   .q_lengths = {20000},
                   .k_lengths = {100},
                   .config = {.block_size = block_size, .top_k = 2}});
    all.push_back(
        {.name = "nothing", .q_lengths = {0}, .k_lengths = {0}, .config = {.block_size = block_size, .top_k = 2}});
    all.push_back(
        {.name = "no batch", .q_lengths = {}, .k_lengths = {}, .config = {.block_size = block_size, .top_k = 2}});
  }
  return all;
}

class IndexCases : public ::testing::TestWithParam<Case> {};

TEST_P(IndexCases, IsTheTranspose) {
  const Case& c = GetParam();
  const Data data(c);
  for (const bool shared : {false, true}) {
    for (const int threads : {0, 1, 3}) {
      Options options = reference_options();
      if (threads > 0) options = {.threads = threads};
      SCOPED_TRACE(describe(options) + (shared ? ", shared" : ""));
      Runner run(c.problem(), options);
      Chosen chosen(run.plan(), c.outputs, shared);
      choose_anything(c, chosen, 7);
      const auto ids = chosen.ids.bits();
      run.index(data.inputs(), chosen);
      expect_transpose(c, chosen, run.plan().max_blocks());
      EXPECT_EQ(chosen.ids.bits(), ids) << "ids are an input";
      EXPECT_TRUE(chosen.surroundings_untouched());
    }
  }
}

TEST_P(IndexCases, OfWhatTheGateChose) {
  const Case& c = GetParam();
  const Data data(c);
  for (const int threads : {1, 4}) {
    Runner run(c.problem(), {.threads = threads});
    Chosen chosen = run.select(data.inputs(), c.outputs);
    ASSERT_TRUE(well_formed(c, chosen));
    expect_transpose(c, chosen, run.plan().max_blocks());
    EXPECT_TRUE(chosen.surroundings_untouched());
  }
}

INSTANTIATE_TEST_SUITE_P(Index, IndexCases, ::testing::ValuesIn(cases()), case_name);

TEST(Index, MakeSelectionCutsMemoryUp) {
  for (const bool shared : {false, true}) {
    Case c{.q_heads = 6, .kv_heads = 2, .q_lengths = {33}, .k_lengths = {70}};
    const Data data(c);
    Runner run(c.problem(), {.threads = 2});
    const std::size_t bytes = run.plan().selection_bytes(shared);
    std::vector<std::int64_t> memory(bytes / 8 + 1, -7);
    ASSERT_EQ(bytes % 8, 0u);
    Selection selection = make_selection(run.plan(), std::as_writable_bytes(std::span(memory)).first(bytes), shared);
    EXPECT_EQ(selection.ids.shape[1], shared ? 2 : 6);
    Chosen chosen(run.plan(), {}, shared);
    choose_anything(c, chosen, 3);
    for (std::int64_t token = 0; token < 33; ++token) {
      for (std::int64_t head = 0; head < chosen.ids.dim(1); ++head) {
        for (std::int64_t slot = 0; slot < chosen.ids.dim(2); ++slot) {
          static_cast<std::int32_t*>(
              selection.ids.data)[(token * chosen.ids.dim(1) + head) * chosen.ids.dim(2) + slot] =
              chosen.ids.as<std::int32_t>(token, head, slot);
        }
      }
    }
    std::vector<std::byte> workspace(run.plan().workspace_bytes());
    index(run.plan(), data.inputs(), selection, workspace);
    run.index(data.inputs(), chosen);
    const auto* rows = static_cast<const std::int32_t*>(selection.rows.data);
    const auto expected = chosen.transpose();
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), rows));
    EXPECT_EQ(memory.back(), -7);
  }
}

}  // namespace
}  // namespace moba::test
