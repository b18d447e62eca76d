// backward of what only the device can see and no call can refuse: tables that lie, ids that are wrong, NaN and
// infinity. They reach what moba/attention.h says, and no memory is touched that was not given.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cases.h"
#include "training.h"

namespace moba::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
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

// What is not finite must, may or may not reach a row; or it changes the order of the row's sums, no more.
enum class Reach { no, order, may, must };
using ReachOf = std::function<Reach(std::int64_t token, std::int64_t head)>;

// Whether two rows differ by at most two units in the last place of the norm.
bool within_rounding(const Array& got, const Array& clean, std::int64_t token, std::int64_t head) {
  double error = 0, norm = 0;
  for (std::int64_t x = 0; x < got.dim(2); ++x) {
    const double should = clean.get(token, head, x), difference = got.get(token, head, x) - should;
    error += difference * difference;
    norm += should * should;
  }
  return std::sqrt(error) <= 2 * (got.dtype() == DType::bf16 ? 0x1p-7 : 0x1p-10) * std::sqrt(norm);
}

void expect_reach(const char* name, const Array& got, const Array& clean, const ReachOf& reach_of) {
  for (std::int64_t token = 0; token < got.dim(0); ++token) {
    for (std::int64_t head = 0; head < got.dim(1); ++head) {
      const Reach reach = reach_of(token, head);
      bool finite = true, same = true;
      for (std::int64_t x = 0; x < got.dim(2); ++x) {
        finite &= std::isfinite(got.get(token, head, x));
        same &= got.get(token, head, x) == clean.get(token, head, x);
      }
      const bool fits = reach == Reach::no      ? same
                        : reach == Reach::order ? within_rounding(got, clean, token, head)
                                                : reach == Reach::may || !finite;
      ASSERT_TRUE(fits) << name << ", token " << token << ", head " << head;
    }
  }
}

// One sequence, trained while everything in it was finite; then something is spoiled.
struct Spoiled {
  Given given;
  CudaRunner run;
  const Trained clean;
  Attention results;

  Spoiled(const Case& c, const std::string& family)
      : given(c), run(c.problem(), cuda_options(family)), clean(train(run, given)), results(clean.results) {}

  std::int64_t group() const { return given.c.q_heads / given.c.kv_heads; }
  bool chose(std::int64_t token, std::int64_t head, std::int64_t key) const {
    const auto blocks = clean.chosen->row(token, head);
    return std::ranges::count(blocks, key / given.c.config.block_size) > 0;
  }
  // Whether two rows of the same key head chose a block in common.
  bool share_a_block(std::int64_t token, std::int64_t head, std::int64_t other, std::int64_t other_head) const {
    if (head / group() != other_head / group()) return false;
    const auto blocks = clean.chosen->row(token, head), others = clean.chosen->row(other, other_head);
    return std::ranges::find_first_of(blocks, others) != blocks.end();
  }
  void expect(const ReachOf& dq, const ReachOf& dk, const ReachOf& dv) {
    Chosen chosen = *clean.chosen;
    const Slopes got = run.backward(given.data.inputs(), chosen, results, given.dout);
    EXPECT_TRUE(got.surroundings_untouched());
    expect_reach("dq", got.dq, clean.slopes.dq, dq);
    expect_reach("dk", got.dk, clean.slopes.dk, dk);
    expect_reach("dv", got.dv, clean.slopes.dv, dv);
  }
};

std::vector<Case> one_sequence() {
  std::vector<Case> cases;
  for (const auto& [d, b] : {std::pair{64, 16}, {64, 64}, {128, 48}, {128, 128}, {128, 144}, {96, 32}, {256, 80}}) {
    Case c{.dtype = cases.size() % 2 == 0 ? DType::bf16 : DType::f16, .q_heads = 4, .kv_heads = 2, .head_dim = d};
    c.q_lengths = c.k_lengths = {300};
    c.config = {.block_size = b, .top_k = 2};
    c.seed = run_seed();
    cases.push_back(c);
  }
  return cases;
}

// A key or its value reaches the rows that see it, and its own gradients; it may reach what else is of its block, and
// no other block.
TEST_F(CudaBackwardBadValues, KeysStayInTheirBlock) {
  constexpr std::int64_t kKey = 70;
  for (const Case& c : one_sequence()) {
    for (const std::string& family : families(c.problem())) {
      for (const bool in_key : {true, false}) {
        for (const float with : {kNaN, kInf, -kInf}) {
          SCOPED_TRACE(::testing::Message() << c << ", " << family << (in_key ? ", key " : ", value ") << with);
          Spoiled s(c, family);
          (in_key ? s.given.data.k : s.given.data.v).set(kKey, 0, 3, with);
          const Reach seen = std::isnan(with) ? Reach::must : Reach::may;
          const auto rows = [&](std::int64_t token, std::int64_t head) {
            if (head / s.group() != 0 || !s.chose(token, head, kKey)) return Reach::no;
            return token >= kKey ? seen : Reach::may;
          };
          const auto keys = [&](bool reached) {
            return [&, reached](std::int64_t token, std::int64_t head) {
              if (head != 0 || token / c.config.block_size != kKey / c.config.block_size) return Reach::no;
              return token == kKey && reached ? seen : Reach::may;
            };
          };
          s.expect(rows, keys(true), keys(in_key));
        }
      }
    }
  }
}

// A row reaches its own gradient and the keys that it sees; it may reach the other keys of its blocks, and nothing
// else. The portable kernel sums in another order where it stands beside a row with anything not finite.
TEST_F(CudaBackwardBadValues, RowsReachOnlyTheirBlocks) {
  constexpr std::int64_t kToken = 200, kHead = 1;
  enum Where { kQ, kDout, kOut, kLse };
  for (const Case& c : one_sequence()) {
    for (const std::string& family : families(c.problem())) {
      for (const Where where : {kQ, kDout, kOut, kLse}) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family << ", in " << where);
        Spoiled s(c, family);
        if (where == kQ) s.given.data.q.set(kToken, kHead, 3, kNaN);
        if (where == kDout) s.given.dout.set(kToken, kHead, 3, kNaN);
        if (where == kOut) s.results.out.set(kToken, kHead, 3, kNaN);
        if (where == kLse) s.results.lse.set(kHead, kToken, 0, kNaN);
        const auto rows = [&](std::int64_t token, std::int64_t head) {
          if (token == kToken && head == kHead) return Reach::must;
          const bool beside = family == "portable" && s.share_a_block(token, head, kToken, kHead);
          return beside ? Reach::order : Reach::no;
        };
        const auto keys = [&](bool reached) {
          return [&, reached](std::int64_t token, std::int64_t head) {
            if (head != kHead / s.group() || !s.chose(kToken, kHead, token)) return Reach::no;
            return token <= kToken && reached ? Reach::must : Reach::may;
          };
        };
        s.expect(rows, keys(true), keys(where != kOut));
      }
    }
  }
}

// All of one sequence is spoiled: the others keep their bits, chosen or dense.
TEST_F(CudaBackwardBadValues, SequencesKeepToThemselves) {
  for (const auto& [d, b] : {std::pair{64, 16}, {128, 128}, {128, 144}, {96, 32}}) {
    for (const bool causal : {true, false}) {
      Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {40, 150, 33}};
      c.k_lengths = {140, 150, 33};
      c.config = {.block_size = b, .top_k = 2, .causal = causal};
      for (const std::string& family : families(c.problem())) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family);
        Spoiled s(c, family);
        const Trained dense = train_dense(s.run, s.given);
        Attention dense_results = dense.results;
        const auto is_spoiled_row = [](std::int64_t token) { return token >= 40 && token < 190; };
        const auto is_spoiled_key = [](std::int64_t token) { return token >= 140 && token < 290; };
        const auto spoil = [](Array& x, const auto& is_spoiled) {
          for (std::int64_t token = 0; token < x.dim(0); ++token) {
            for (std::int64_t head = 0; is_spoiled(token) && head < x.dim(1); ++head) {
              for (std::int64_t i = 0; i < x.dim(2); ++i) x.set(token, head, i, kNaN);
            }
          }
        };
        for (Array* x : {&s.given.data.q, &s.given.dout, &s.results.out, &dense_results.out}) spoil(*x, is_spoiled_row);
        for (Array* x : {&s.given.data.k, &s.given.data.v}) spoil(*x, is_spoiled_key);
        const auto rows = [&](std::int64_t token, std::int64_t) {
          return is_spoiled_row(token) ? Reach::must : Reach::no;
        };
        const auto keys = [&](std::int64_t token, std::int64_t) {
          return is_spoiled_key(token) ? Reach::may : Reach::no;
        };
        s.expect(rows, keys, keys);
        const Slopes got = s.run.dense_backward(s.given.data.inputs(), dense_results, s.given.dout);
        expect_reach("dense dq", got.dq, dense.slopes.dq, rows);
        expect_reach("dense dk", got.dk, dense.slopes.dk, keys);
        expect_reach("dense dv", got.dv, dense.slopes.dv, keys);
      }
    }
  }
}

// A row that chose nothing gets and gives zeros, whatever its dout is.
TEST_F(CudaBackwardBadValues, SmallRowsWithoutKeysGiveNothing) {
  for (const std::int64_t d : {64, 128, 96}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {190}, .k_lengths = {60}};
    c.config = {.block_size = 16, .top_k = 2};
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      Spoiled s(c, family);
      for (std::int64_t token = 0; token < 130; ++token) {
        for (std::int64_t head = 0; head < 4; ++head) s.given.dout.set(token, head, 5, token % 2 == 0 ? kNaN : kInf);
      }
      const auto nowhere = [](std::int64_t, std::int64_t) { return Reach::no; };
      s.expect(nowhere, nowhere, nowhere);
      for (std::int64_t x = 0; x < d; ++x) EXPECT_EQ(s.clean.slopes.dq.get(7, 1, x), 0);
    }
  }
}

}  // namespace
}  // namespace moba::test
