// The numbers behind the picture: the shares of its cells and the kept attention mass.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kept_mass.h"
#include "moba/attention.h"
#include "selection_map.h"
#include "selection_svg.h"

namespace moba::cli {
namespace {

Problem one_head(std::int64_t tq, std::int64_t tk, std::int64_t block, std::int64_t top_k) {
  Problem problem;
  problem.head_dim = 8;
  problem.total_q = tq;
  problem.total_k = tk;
  problem.config.block_size = block;
  problem.config.top_k = top_k;
  return problem;
}

TEST(SelectionMap, CountsQueriesPerBlock) {
  const Plan plan(one_head(4, 4, 2, 2));
  std::vector<std::int32_t> ids{0, -1, 0, -1, 1, -1, 0, 1};  // query 2 leaves block 0 out
  Selection selection;
  selection.ids = Tensor(ids.data(), DType::i32, {4, 1, 2});
  const SelectionMap map = make_selection_map(plan, selection.ids, 0, 4, 4, 128);
  ASSERT_EQ(map.rows, 2);
  ASSERT_EQ(map.columns, 2);
  EXPECT_EQ(map.share(0, 0, 0), 1.0);
  EXPECT_EQ(map.share(0, 0, 1), 0.0);
  EXPECT_EQ(map.share(0, 1, 0), 0.5);
  EXPECT_EQ(map.share(0, 1, 1), 1.0);
}

TEST(SelectionMap, AggregatesBlocksIntoCells) {
  const Plan plan(one_head(6, 6, 1, 1));
  std::vector<std::int32_t> ids{0, 1, 2, 3, 4, 5};
  Selection selection;
  selection.ids = Tensor(ids.data(), DType::i32, {6, 1, 1});
  const SelectionMap map = make_selection_map(plan, selection.ids, 0, 6, 6, 2);
  EXPECT_EQ(map.blocks_per_cell, 3);
  EXPECT_EQ(map.rows, 2);
  EXPECT_NEAR(map.share(0, 0, 0), 1.0 / 3, 1e-12);  // 3 of 3 x 3 pairs
  EXPECT_EQ(map.share(0, 1, 0), 0.0);
}

TEST(SelectionMap, DrawsOnlyTheRowsOfItsQueries) {
  const Plan plan(one_head(1, 10, 2, 2));
  std::vector<std::int32_t> ids{1, 4};
  Selection selection;
  selection.ids = Tensor(ids.data(), DType::i32, {1, 1, 2});
  const SelectionMap map = make_selection_map(plan, selection.ids, 0, 1, 10, 128);
  EXPECT_EQ(map.first_row, 4);
  EXPECT_EQ(map.rows, 1);
  EXPECT_EQ(map.columns, 5);
  EXPECT_EQ(map.share(0, 0, 1), 1.0);
  EXPECT_EQ(map.share(0, 0, 2), 0.0);
}

TEST(SelectionMap, QueriesBeforeTheFirstKeyAreLeftOut) {
  const Plan plan(one_head(3, 1, 2, 1));
  std::vector<std::int32_t> ids{-1, -1, 0};
  Selection selection;
  selection.ids = Tensor(ids.data(), DType::i32, {3, 1, 1});
  const SelectionMap map = make_selection_map(plan, selection.ids, 0, 3, 1, 128);
  EXPECT_EQ(map.rows, 1);
  EXPECT_EQ(map.share(0, 0, 0), 1.0);
  EXPECT_TRUE(make_selection_map(plan, selection.ids, 0, 3, 0, 128).shares.empty());
}

TEST(SelectionSvg, ManyHeadsGetFewerCells) {
  EXPECT_EQ(most_cells_for(1), 128);
  EXPECT_LT(most_cells_for(64), most_cells_for(16));
  EXPECT_GE(most_cells_for(1'000'000), 8);
}

TEST(KeptMass, FollowsFromTheTwoLse) {
  Problem problem = one_head(4, 4, 1, 2);
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<float> dense{none, 1.0f, 2.0f, 3.0f};
  const std::vector<float> moba{none, 1.0f, 2.0f + std::log(0.5f), 3.0f + std::log(0.25f)};
  const ConstTensor dense_lse(dense.data(), DType::f32, {1, 4}), moba_lse(moba.data(), DType::f32, {1, 4});
  const KeptMass head = kept_mass(problem, {0, 4}, {0, 4}, moba_lse, dense_lse, 0, 1).at(0);
  EXPECT_EQ(head.rows, 3);
  EXPECT_EQ(head.choosing_rows, 2);  // positions 2 and 3 have more than two blocks in reach
  EXPECT_NEAR(head.mean, 1.75 / 3, 1e-6);
  EXPECT_NEAR(head.choosing_mean, 0.375, 1e-6);
  EXPECT_NEAR(head.min, 0.25, 1e-6);
  EXPECT_EQ(kept_mass(problem, {0, 4}, {0, 4}, moba_lse, dense_lse, 0, 0).at(0).rows, 0);
}

// A row whose chosen blocks hold only keys of weight 0 kept nothing of what full attention gives it: that counts. A row
// that full attention gives nothing, or an lse that is no number, does not.
TEST(KeptMass, NothingKeptCounts) {
  const Problem problem = one_head(6, 6, 1, 2);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> dense{1, 2, 3, -inf, nan, inf}, moba{1, 2, -inf, -inf, -inf, -inf};
  const ConstTensor dense_lse(dense.data(), DType::f32, {1, 6}), moba_lse(moba.data(), DType::f32, {1, 6});
  const KeptMass head = kept_mass(problem, {0, 6}, {0, 6}, moba_lse, dense_lse, 0, 1).at(0);
  EXPECT_EQ(head.rows, 3);
  EXPECT_NEAR(head.mean, 2.0 / 3, 1e-12);
  EXPECT_EQ(head.min, 0);
  EXPECT_EQ(head.choosing_rows, 1);
  EXPECT_EQ(head.choosing_mean, 0);
  const std::vector<float> broken{nan, inf, 3, -inf, 1, 1};
  const ConstTensor broken_lse(broken.data(), DType::f32, {1, 6});
  EXPECT_EQ(kept_mass(problem, {0, 6}, {0, 6}, broken_lse, dense_lse, 0, 1).at(0).rows, 1);
}

}  // namespace
}  // namespace moba::cli
