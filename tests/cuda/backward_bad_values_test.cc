// backward of what only the device can see and no call can refuse: tables that lie and ids that are wrong. They reach
// what moba/attention.h says, and no memory is touched that was not given.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cases.h"
#include "training.h"

namespace moba::test {
namespace {

constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

::testing::AssertionResult all_nan(const Slopes& slopes) {
  if (!slopes.surroundings_untouched()) return ::testing::AssertionFailure() << "wrote beyond the gradients";
  for (const auto& [name, x] : {std::pair{"dq", &slopes.dq}, {"dk", &slopes.dk}, {"dv", &slopes.dv}}) {
    const auto numbers = x->numbers();
    const auto found = std::ranges::find_if_not(numbers, [](double number) { return std::isnan(number); });
    if (found == numbers.end()) continue;
    return ::testing::AssertionFailure() << name << ", number " << found - numbers.begin() << " of " << numbers.size()
                                         << ": " << *found;
  }
  return ::testing::AssertionSuccess();
}

// backward and dense_backward, from what `trained` chose and computed.
void expect_all_nan(CudaRunner& run, const Given& bad, Trained trained) {
  EXPECT_TRUE(all_nan(run.backward(bad.data.inputs(), *trained.chosen, trained.results, bad.dout)));
  EXPECT_TRUE(all_nan(run.dense_backward(bad.data.inputs(), trained.results, bad.dout))) << "dense_backward";
}

class CudaBackwardBadValues : public CudaTest {};

TEST_F(CudaBackwardBadValues, SmallTablesThatLie) {
  const std::vector<Lie> lies = tables_that_lie();
  for (const std::int64_t d : {32, 64, 128}) {
    Case c{
        .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {60, 39}, .k_lengths = {75, 99}};
    c.config = {.block_size = 16, .top_k = 3, .causal = d == 128};
    if (d != 64) c.rope = Rope{};
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      CudaRunner run(c.problem(), cuda_options(family));
      const Trained good = train(run, given);
      for (std::size_t i = 0; i < lies.size(); ++i) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family << ", lie " << i);
        Given bad(c);
        lies[i].tell(bad.data);
        expect_all_nan(run, bad, good);
      }
      EXPECT_TRUE(train(run, given).slopes.bits() == good.slopes.bits());  // the next call is as good as any
    }
  }
}

// Where a kernel of its own looks through the table.
TEST_F(CudaBackwardBadValues, LongTablesThatLie) {
  const Given given(many_sequences());
  CudaRunner run(given.c.problem());
  const Trained good = train(run, given);
  for (const std::int64_t at : {0, 1, 1023, 1024, 2999, 3000}) {
    for (const bool q : {true, false}) {
      SCOPED_TRACE(::testing::Message() << "entry " << at);
      Given bad = given;
      (q ? *bad.data.cu_seqlens_q : *bad.data.cu_seqlens_k).as<std::int32_t>(at) += at == 3000 ? 1 : -1000;
      expect_all_nan(run, bad, good);
    }
  }
}

// Queries before the first key have no row in a table of the caller's: such cu_seqlens are not as they must be.
TEST_F(CudaBackwardBadValues, SmallRopeTableWithoutNegativePositions) {
  const FewPositions few;
  const Case& c = few.c;
  const Given given(c);
  CudaRunner run(c.problem());
  expect_all_nan(run, given, train(run, given));
}

// Rows of one head with ids that break the rules get NaN and take no part in anything else: dk, dv and the other rows
// are as if they had none. `wrong` are dealt out to them in turn.
void expect_wrong_ids_left_out(const Case& c, bool shared, const std::vector<std::vector<std::int32_t>>& wrong) {
  const Given given(c);
  const std::int64_t tokens = given.data.q.dim(0), q_heads = c.q_heads;
  for (const std::string& family : families(c.problem())) {
    SCOPED_TRACE(::testing::Message() << c << ", " << family << (shared ? ", shared" : ""));
    CudaRunner run(c.problem(), cuda_options(family));
    Chosen good(run.plan(), {}, shared);
    choose_anything(c, good, run_seed());
    Attention results = run.attend(given.data.inputs(), good);
    Chosen bad = good, emptied = good;
    const std::int64_t heads = good.ids.dim(1), slots = good.ids.dim(2);
    const auto is_bad = [&](std::int64_t token, std::int64_t head) { return token % 5 == 2 && head % heads == 1; };
    for (std::int64_t token = 2, next = 0; token < tokens; token += 5, ++next) {
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        bad.ids.as<std::int32_t>(token, 1, slot) = wrong[next % wrong.size()][slot];
      }
      emptied.set_row(token, 1, {});
    }
    const Slopes expected = run.backward(given.data.inputs(), emptied, results, given.dout);
    const Slopes got = run.backward(given.data.inputs(), bad, results, given.dout);
    EXPECT_TRUE(got.surroundings_untouched());
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t head = 0; head < q_heads; ++head) {
        const bool nan = is_bad(token, shared ? head / 2 : head);
        for (std::int64_t x = 0; x < c.head_dim; ++x) {
          ASSERT_TRUE(nan ? std::isnan(got.dq.get(token, head, x))
                          : got.dq.get(token, head, x) == expected.dq.get(token, head, x))
              << "token " << token << ", head " << head;
        }
      }
    }
    EXPECT_TRUE(got.dk.bits() == expected.dk.bits());
    EXPECT_TRUE(got.dv.bits() == expected.dv.bits());
  }
}

TEST_F(CudaBackwardBadValues, SmallWrongIds) {
  const std::vector<std::vector<std::int32_t>> wrong{{2, 1, -1}, {1, 1, 2},   {0, 7, -1},   {0, kMost, -1},
                                                     {-2, 1, 2}, {-1, 1, -1}, {1, -2, -1},  {-kMost - 1, -1, -1},
                                                     {0, 2, 2},  {0, -1, 2},  {1, 2, kMost}};
  for (const std::int64_t d : {64, 128, 96}) {
    for (const bool shared : {false, true}) {
      Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {60, 39}};
      c.k_lengths = {75, 99};  // 5 blocks and 7
      c.config = {.block_size = 16, .top_k = 3};
      expect_wrong_ids_left_out(c, shared, wrong);
    }
  }
}

// Ids are read 8 or 16 at a time: the wrong one stands at either side of such a place, or comes last.
TEST_F(CudaBackwardBadValues, SmallWrongIdsOfLongRows) {
  for (const std::int32_t top_k : {12, 20}) {
    std::vector<std::int32_t> right(static_cast<std::size_t>(top_k));
    for (std::int32_t i = 0; i < top_k; ++i) right[static_cast<std::size_t>(i)] = i;
    std::vector<std::vector<std::int32_t>> wrong;
    for (const std::int32_t place : {7, 8, 15, 16, top_k - 1}) {
      if (place >= top_k) continue;
      const auto at = static_cast<std::size_t>(place);
      for (const std::int32_t id : {place - 1, place - 2, -2, 100, kMost}) {  // 100: more than there are
        wrong.push_back(right);
        wrong.back()[at] = id;
      }
      if (place == top_k - 1) continue;
      wrong.push_back(right);
      wrong.back()[at] = -1;  // and then an id
    }
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 64, .q_lengths = {60, 139}};
    c.k_lengths = {380, 420};
    c.config = {.block_size = 16, .top_k = top_k};
    expect_wrong_ids_left_out(c, false, wrong);
  }
}

}  // namespace
}  // namespace moba::test
