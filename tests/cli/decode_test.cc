// moba decode: the same as one prefill in every shape, what it counts, what it refuses.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "attention_file.h"
#include "prefill_check.h"
#include "support.h"
#include "text.h"

namespace moba::cli {
namespace {

class CliDecode : public testing::Test {
 protected:
  Finished decode(const std::vector<std::string>& options = {}) {
    return run_choosing({"decode", in_, "--repeat", "1"}, options);
  }
  // It finds decode and prefill alike, in so many rows, and says so many tokens were fed in one call and one by one.
  Finished expect_same(const std::vector<std::string>& options, int prefill, int tokens) {
    Finished run = decode(options);
    SCOPED_TRACE(testing::PrintToString(options));
    EXPECT_EQ(run.code, 0) << run.err << run.out;
    const int rows = (prefill + tokens) * static_cast<int>(input_.q_heads);
    for (const std::string& text :
         {format("same blocks in %d of %d rows\n", rows, rows), format(": %d tokens in one call, ", prefill),
          format("; then %d one by one; ", tokens)}) {
      EXPECT_NE(run.out.find(text), std::string::npos) << text << "\n" << run.out;
    }
    return run;
  }
  void refuse(std::vector<std::string> arguments, int code, const std::string& message) {
    arguments.insert(arguments.begin(), {"decode", in_});
    expect_refusal(arguments, code, "moba: " + message + "\n");
  }

  TemporaryFolder folder_;
  SmallInput input_;
  const std::string in_ = folder_.file("in");
};

TEST_F(CliDecode, EveryPrefillGivesTheSame) {
  input_.tq = input_.tk = 61;
  input_.write(in_);
  for (const int prefill : {0, 1, 7, 8, 9, 40, 60, 61}) {
    expect_same({"--prefill", std::to_string(prefill)}, prefill, 61 - prefill);
  }
  expect_same({}, 30, 31);
  expect_same({"--tokens", "5"}, 30, 5);
  expect_same({"--tokens", "50"}, 11, 50);
  expect_same({"--tokens", "0"}, 30, 0);
  expect_same({"--prefill", "20", "--tokens", "3"}, 20, 3);
}

TEST_F(CliDecode, EveryPageSizeGivesTheSame) {
  input_.write(in_);
  for (const int page : {1, 3, 4, 8, 16, 64, 100, 100000}) {
    const Finished run = expect_same({"--page-size", std::to_string(page), "--rope"}, 32, 32);
    EXPECT_NE(run.out.find("cache in pages of " + std::to_string(page) + " tokens\n"), std::string::npos) << run.out;
  }
  EXPECT_NE(expect_same({"--rope"}, 32, 32).out.find("cache contiguous\n"), std::string::npos);
}

TEST_F(CliDecode, EveryOptionGivesTheSame) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    input_.dtype = dtype;
    input_.write(in_);
    for (const std::vector<std::string>& options :
         std::vector<std::vector<std::string>>{{"--backend", "reference"},
                                               {"--threads", "1"},
                                               {"--top-k", "1"},
                                               {"--top-k", "100"},
                                               {"--block-size", "1"},
                                               {"--block-size", "1000"},
                                               {"--scale", "30"},
                                               {"--scale", "-1"},
                                               {"--rope-style", "interleaved", "--rope-dim", "6"},
                                               {"--rope-scaling", "linear", "--rope-factor", "4"}}) {
      expect_same(options, 32, 32);
    }
  }
  input_.tq = input_.tk = 1;
  input_.write(in_);
  expect_same({}, 0, 1);
  expect_same({"--prefill", "1"}, 1, 0);
}

TEST_F(CliDecode, FeedsOneSequenceOfAPack) {
  input_.offsets["cu_seqlens"] = {0, 10, 10, 64};
  input_.write(in_);
  EXPECT_EQ(expect_same({}, 5, 5).out.find("sequence 2"), std::string::npos);
  EXPECT_NE(expect_same({"--sequence", "2"}, 27, 27).out.find("\nsequence 2: 27 tokens"), std::string::npos);
  refuse({"--sequence", "1"}, kRefused, "sequence 1: has no tokens; allowed: 1 or more");
  refuse({"--sequence", "3"}, kRefused, "--sequence: is 3; the file holds 3 sequences, numbered from 0");
  input_.offsets = {{"cu_seqlens_q", {0, 14, 64}}, {"cu_seqlens_k", {0, 10, 64}}};
  input_.write(in_);
  refuse({}, kRefused, "sequence 0: has 14 queries, 10 keys; allowed: as many, for every token to be decoded");
  input_.offsets = {{"cu_seqlens", {0}}};
  input_.tq = input_.tk = 0;
  input_.write(in_);
  refuse({}, kRefused, "--sequence: is 0; the file holds 0 sequences, numbered from 0");
}

// The same from the ids that moba run writes, by counting every key and centroid on its own.
TEST_F(CliDecode, CountsTheBytesThatMustBeRead) {
  input_.write(in_);
  const std::string out = folder_.file("out");
  ASSERT_EQ(run_moba({"run", in_, "-o", out, "--block-size", "8", "--top-k", "3", "--selection"}).code, 0);
  const std::vector<std::int32_t> ids = read_ints(SafetensorsReader(out), "ids");
  const int prefill = 20, heads = 4, slots = 3;
  double bytes = 0, dense = 0;
  for (int token = prefill; token < 64; ++token) {
    std::set<std::pair<int, int>> keys;  // key head and key
    for (int i = token * heads * slots; i < (token + 1) * heads * slots; ++i) {
      const int key_head = i / slots % heads / 2, block = ids[static_cast<std::size_t>(i)];
      for (int key = block * 8; block >= 0 && key < block * 8 + 8 && key <= token; ++key) keys.emplace(key_head, key);
    }
    const int centroids = token / 8 > 2 ? 2 * (token / 8) : 0;
    bytes += static_cast<double>(2 * static_cast<int>(keys.size()) + centroids) * 16 * 4 / 44;
    dense += (token + 1) * 2 * 2 * 16 * 4 / 44.0;
  }
  const Finished run = expect_same({"--prefill", std::to_string(prefill)}, prefill, 44);
  for (const std::string& text : {" " + format_bytes(bytes) + " ", " " + format_bytes(dense) + " ",
                                  format("%.2f in bytes read\n", dense / bytes)}) {
    EXPECT_NE(run.out.find(text), std::string::npos) << text << "\n" << run.out;
  }
  EXPECT_NE(decode({"--top-k", "8"}).out.find(" 1.00 in bytes read\n"), std::string::npos);
  EXPECT_EQ(decode({"--tokens", "0"}).out.find("tokens/s"), std::string::npos) << "nothing was timed";
}

TEST_F(CliDecode, Refusals) {
  input_.write(in_);
  const std::string help = " (see moba decode --help)";
  refuse({"--prefill", "65"}, kRefused, "--prefill: is 65; allowed: 0 to 64, the tokens of the sequence");
  refuse({"--tokens", "65"}, kRefused, "--tokens: is 65; allowed: 0 to 64, what the prefill leaves of the sequence");
  refuse({"--prefill", "60", "--tokens", "5"}, kRefused,
         "--tokens: is 5; allowed: 0 to 4, what the prefill leaves of the sequence");
  refuse({"--prefill", "0", "--tokens", "0"}, kRefused, "--tokens: is 0; allowed: 1 or more, where --prefill is 0");
  refuse({"--prefill", "-1"}, kWrongCommandLine,
         "--prefill: is '-1'; allowed: whole numbers from 0 to 2147483647" + help);
  refuse({"--page-size", "0"}, kWrongCommandLine,
         "--page-size: is '0'; allowed: whole numbers from 1 to 2147483647" + help);
  expect_refusal({"decode", in_, "--no-causal"}, kWrongCommandLine, "--no-causal");
  expect_refusal({"decode", in_, "-o", folder_.file("out")}, kWrongCommandLine, "-o");
  input_.offsets["cu_seqlens"] = {0, 40, 30, 64};
  input_.write(in_);
  expect_refusal({"decode", in_}, kRefused, "moba: cu_seqlens_q");
  input_.offsets.clear();
  input_.d = 256;
  input_.write(in_);
  expect_refusal({"decode", in_, "--page-size", "2147483647"}, kRefused, "moba: memory: 8.0");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

TEST_F(CliDecode, RefusesTensorsThatDoNotFit) {
  const Buffer memory(65536);
  std::memset(memory.data(), 0, memory.size());
  const auto refuse_shapes = [&](std::initializer_list<std::int64_t> k, std::initializer_list<std::int64_t> v,
                                 const std::string& part) {
    write_safetensors(in_, {{"q", ConstTensor(memory.data(), DType::f32, {40, 2, 8})},
                            {"k", ConstTensor(memory.data(), DType::f32, k)},
                            {"v", ConstTensor(memory.data(), DType::f32, v)}});
    expect_refusal({"decode", in_}, kRefused, part);
  };
  refuse_shapes({40, 1, 8}, {39, 1, 8}, "moba: v: is f32 [39, 1, 8]; allowed: as many tokens as k, f32 [40, 1, 8]\n");
  refuse_shapes({40, 1, 8}, {40, 2, 8}, "moba: v: is f32 [");
  refuse_shapes({40, 1, 16}, {40, 1, 8}, "moba: k: is f32 [");
  refuse_shapes({40, 0, 8}, {40, 0, 8}, "heads");
  refuse_shapes({50, 1, 8}, {50, 1, 8}, "moba: sequence 0: has 40 queries, 50 keys");
}

// What the comparison finds, in a replay that is spoiled.
class PrefillComparison : public testing::Test {
 protected:
  PrefillComparison() {
    problem_.q_heads = 2;
    problem_.head_dim = 8;
    problem_.total_q = problem_.total_k = 40;
    problem_.config.block_size = 8;
    problem_.config.top_k = 2;
    const SmallInput input{
        .tq = 40, .tk = 40, .q_heads = 2, .kv_heads = 1, .d = 8, .dtype = DType::f32, .offsets = {}, .dout = false};
    input.write(folder_.file("in"));
    file_ = read_attention_file(folder_.file("in"));
  }

  // A replay of all tokens after `prefill` of them, with `spoil` done to what came out.
  template <class Spoil>
  PrefillCheck check(Spoil spoil) {
    const Plan plan(problem_);
    CacheProblem cached{
        .q_heads = 2, .kv_heads = 1, .head_dim = 8, .max_length = 40, .config = problem_.config, .rope = {}};
    const CachePlan cache_plan(cached);
    ReplayCache cache(cache_plan, 0);
    const Replayed replayed(cache_plan, 40, true);
    const Buffer workspace(cache_plan.workspace_bytes());
    EXPECT_GE(replay(cache_plan, file_.inputs, 0, 40, 1, cache, replayed, workspace.span()), 0);
    StagedForward forward(plan, file_.inputs);
    Progress progress;
    forward.run(progress);
    spoil(static_cast<float*>(replayed.out.data), static_cast<std::int32_t*>(replayed.ids.data), forward);
    return check_against_prefill(plan, forward, replayed);
  }

  TemporaryFolder folder_;
  AttentionFile file_;
  Problem problem_;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST_F(PrefillComparison, PassesWhatIsTheSame) {
  const PrefillCheck same = check([](float*, std::int32_t*, const StagedForward&) {});
  EXPECT_TRUE(same.passed());
  EXPECT_EQ(same.rows, 80);
  EXPECT_EQ(same.same_ids, 80);
  EXPECT_LE(same.error, 1e-6);
  EXPECT_LE(same.allowed, 1e-5);
  const auto both_nan = [](float* out, std::int32_t*, const StagedForward& forward) {
    out[9] = static_cast<float*>(forward.outputs().out.data)[9] = kNan;
  };
  EXPECT_TRUE(check(both_nan).passed());
  EXPECT_EQ(check(both_nan).not_finite, 1);
}

TEST_F(PrefillComparison, FindsWhatIsOff) {
  const PrefillCheck off = check([](float* out, std::int32_t*, const StagedForward&) { out[500] += 0.001f; });
  EXPECT_FALSE(off.passed());
  EXPECT_GT(off.error, off.allowed);
  EXPECT_EQ(off.same_ids, off.rows);
  EXPECT_FALSE(check([](float* out, std::int32_t*, const StagedForward&) { out[500] = kNan; }).passed());
  const PrefillCheck other = check([](float*, std::int32_t* ids, const StagedForward&) { ids[100] += 1; });
  EXPECT_FALSE(other.passed());
  EXPECT_EQ(other.same_ids, 79);
}

}  // namespace
}  // namespace moba::cli
