// What is not finite in backward: it reaches what docs/spec.md section 11 says, and nothing else.
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

  // `chosen` null: what the gate chooses.
  Spoiled(const Case& c, const std::string& family, const Chosen* chosen = nullptr)
      : given(c),
        run(c.problem(), cuda_options(family)),
        clean(chosen == nullptr ? train(run, given) : train_on(run, given, *chosen)),
        results(clean.results) {}

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

class CudaBackwardReach : public CudaTest {};

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
TEST_F(CudaBackwardReach, KeysStayInTheirBlock) {
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
TEST_F(CudaBackwardReach, RowsReachOnlyTheirBlocks) {
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
TEST_F(CudaBackwardReach, SequencesKeepToThemselves) {
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

// Some rows choose nothing but the last block, which they do not see. `in_company`: the rows that see it choose it too.
bool is_blind(std::int64_t token) { return token < 200 && token % 7 == 5; }
Chosen choose_blindly(const Case& c, bool in_company) {
  Chosen chosen(Plan(c.problem(), reference_options()));
  const auto last = static_cast<std::int32_t>((c.k_lengths[0] - 1) / c.config.block_size);
  for (std::int64_t token = 0; token < c.q_lengths[0]; ++token) {
    const auto own = static_cast<std::int32_t>(token / c.config.block_size);
    for (std::int64_t head = 0; head < c.q_heads; ++head) {
      chosen.set_row(token, head, {is_blind(token) ? last : own == last && !in_company ? 0 : own});
    }
  }
  return chosen;
}

void expect_nothing_seen(const Spoiled& s, bool in_company) {
  const Trained& t = s.clean;
  EXPECT_TRUE(near(s.given, t, f64_gradients(s.given, t)));
  const Case& c = s.given.c;
  const std::int64_t last = (c.k_lengths[0] - 1) / c.config.block_size * c.config.block_size;
  for (std::int64_t x = 0; x < c.head_dim; ++x) {
    for (std::int64_t head = 0; head < c.q_heads; ++head) {
      for (std::int64_t token = 0; token < c.q_lengths[0]; ++token) {
        if (!is_blind(token)) continue;
        ASSERT_EQ(t.results.lse.get(head, token), -kInf) << "token " << token;
        ASSERT_EQ(t.results.out.get(token, head, x), 0) << "token " << token;
        ASSERT_EQ(t.slopes.dq.get(token, head, x), 0) << "token " << token;
      }
    }
    for (std::int64_t head = 0; head < c.kv_heads; ++head) {
      for (std::int64_t key = last; key < c.k_lengths[0] && !in_company; ++key) {
        ASSERT_EQ(t.slopes.dk.get(key, head, x), 0) << "key " << key;
        ASSERT_EQ(t.slopes.dv.get(key, head, x), 0) << "key " << key;
      }
    }
  }
}

// They get and give zeros. Where dout of one is not finite, the kernel of Hopper may give NaN to that row and to the
// keys of the block; the portable one, which leaves out what has no weight, does not.
TEST_F(CudaBackwardReach, RowsThatSeeNothingOfTheirChoice) {
  constexpr std::int64_t kToken = 40, kHead = 1;
  ASSERT_TRUE(is_blind(kToken));
  for (const Case& c : one_sequence()) {
    for (const bool in_company : {false, true}) {
      const Chosen chosen = choose_blindly(c, in_company);
      for (const std::string& family : families(c.problem())) {
        Spoiled s(c, family, &chosen);
        const std::string what = ::testing::PrintToString(c) + ", " + family + (in_company ? ", in company" : "");
        SCOPED_TRACE(what);
        expect_nothing_seen(s, in_company);
        const bool portable = family == "portable";
        for (const float with : {kNaN, kInf, -kInf}) {
          SCOPED_TRACE(with);
          s.given.dout.set(kToken, kHead, 3, with);
          const auto rows = [&](std::int64_t token, std::int64_t head) {
            if (token == kToken && head == kHead) return portable ? Reach::no : Reach::may;
            return portable && s.share_a_block(token, head, kToken, kHead) ? Reach::order : Reach::no;
          };
          const auto keys = [&](std::int64_t token, std::int64_t head) {
            if (head != kHead / s.group() || !s.chose(kToken, kHead, token)) return Reach::no;
            return portable ? Reach::order : Reach::may;
          };
          s.expect(rows, keys, keys);
        }
      }
    }
  }
}

// A row that chose nothing gets and gives zeros, whatever its dout is.
TEST_F(CudaBackwardReach, SmallRowsWithoutKeysGiveNothing) {
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
