// The program as a user runs it: what it does when everything is right.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moba/info.h"
#include "support.h"

namespace moba::cli {
namespace {

void expect_success(const Finished& run) {
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.err, "");
}

TEST(Cli, HelpTeaches) {
  const Finished overview = run_moba({"--help"});
  expect_success(overview);
  for (const char* command : {"run", "dense", "compare", "backward", "decode", "map", "plan", "bench", "info"}) {
    EXPECT_NE(overview.out.find(command), std::string::npos) << command;
    const Finished help = run_moba({command, "--help"});
    expect_success(help);
    EXPECT_NE(help.out.find("Usage: moba " + std::string(command)), std::string::npos) << help.out;
  }
  for (const char* command : {"run", "dense", "compare", "backward", "decode", "map", "plan", "bench"}) {
    EXPECT_NE(run_moba({command, "--help"}).out.find("Example"), std::string::npos) << command;
  }
  EXPECT_EQ(run_moba({"--version"}).out.rfind("moba ", 0), 0u);
}

TEST(Cli, RunWritesOutLseAndIds) {
  const TemporaryFolder folder;
  SmallInput{}.write(folder.file("in"));
  const Finished run = run_moba({"run", folder.file("in"), "-o", folder.file("out"), "--block-size", "8", "--top-k",
                                 "3", "--rope-base", "500", "--selection"});
  expect_success(run);
  for (const char* stage : {"rope", "pool", "gate", "index", "attend", "total"}) {
    EXPECT_NE(run.out.find(std::string("\n") + stage), std::string::npos) << stage;
  }
  const SafetensorsReader result(folder.file("out"));
  EXPECT_EQ(describe(*result.find("out")), "F32 [64, 4, 16]");
  EXPECT_EQ(describe(*result.find("lse")), "F32 [4, 64]");
  EXPECT_EQ(describe(*result.find("ids")), "I32 [64, 4, 3]");
  EXPECT_EQ(result.metadata().at("block_size"), "8");
  EXPECT_EQ(result.metadata().at("rope_base"), "500");
  EXPECT_EQ(folder.names(), (std::vector<std::string>{"in", "out"}));
}

TEST(Cli, QuietPrintsNothingAndIdsAreOptional) {
  const TemporaryFolder folder;
  SmallInput{}.write(folder.file("in"));
  const Finished run = run_moba({"run", folder.file("in"), "--output", folder.file("out"), "--quiet"});
  expect_success(run);
  EXPECT_EQ(run.out, "");
  EXPECT_EQ(SafetensorsReader(folder.file("out")).find("ids"), nullptr);
}

TEST(Cli, SaysThatRowsAreNotFinite) {
  TemporaryFolder folder;
  const std::string in = folder.file("in");
  SmallInput{}.write(in);
  // Scores beyond float32: every row but the first, which has a single key, may overflow.
  const Finished run = run_moba({"run", in, "-o", folder.file("out"), "--scale", "1e38"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_NE(run.out.find("of 256 rows of out are not finite"), std::string::npos) << run.out;
}

TEST(Cli, OutputFollowsALink) {
  const TemporaryFolder folder;
  SmallInput{}.write(folder.file("in"));
  write_bytes(folder.file("target"), "old");
  std::filesystem::create_symlink(folder.file("target"), folder.file("link"));
  expect_success(run_moba({"run", folder.file("in"), "-o", folder.file("link")}));
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("link")));
  EXPECT_NE(SafetensorsReader(folder.file("target")).find("out"), nullptr);
}

TEST(Cli, AllBlocksAreFullAttention) {
  const TemporaryFolder folder;
  SmallInput{}.write(folder.file("in"));
  for (const std::vector<std::string>& options :
       {std::vector<std::string>{}, {"--no-causal"}, {"--rope"}, {"--scale", "0.7"}}) {
    std::vector<std::string> moba{"run", folder.file("in"), "-o", folder.file("moba"), "--block-size",
                                  "16",  "--top-k",         "4"};
    std::vector<std::string> dense{"dense", folder.file("in"), "-o", folder.file("dense")};
    moba.insert(moba.end(), options.begin(), options.end());
    dense.insert(dense.end(), options.begin(), options.end());
    expect_success(run_moba(moba));
    expect_success(run_moba(dense));
    const SafetensorsReader a(folder.file("moba")), b(folder.file("dense"));
    EXPECT_LT(largest_row_error(read_floats(a, "out"), read_floats(b, "out"), 16), 1e-5);
  }
}

// An option that changes nothing has been dropped on its way.
TEST(Cli, EveryOptionReachesTheComputation) {
  const TemporaryFolder folder;
  SmallInput{}.write(folder.file("in"));
  std::vector<std::vector<float>> results;
  for (const std::vector<std::string>& options : std::vector<std::vector<std::string>>{
           {},
           {"--block-size", "4"},
           {"--top-k", "1"},
           {"--no-causal"},
           {"--scale", "0.6"},
           {"--rope"},
           {"--rope-base", "300"},
           {"--rope-style", "interleaved"},
           {"--rope-dim", "8"},
           {"--rope-scaling", "linear", "--rope-factor", "4"},
           {"--rope-scaling", "llama3", "--rope-factor", "4", "--rope-original-max-position", "64"},
           {"--rope-scaling", "llama3", "--rope-factor", "4", "--rope-original-max-position", "64",
            "--rope-low-freq-factor", "2"},
           {"--rope-scaling", "llama3", "--rope-factor", "4", "--rope-original-max-position", "64",
            "--rope-high-freq-factor", "8"},
           {"--rope-scaling", "yarn", "--rope-factor", "4", "--rope-original-max-position", "64"},
           {"--rope-scaling", "yarn", "--rope-factor", "4", "--rope-original-max-position", "64", "--rope-beta-fast",
            "2"},
           {"--rope-scaling", "yarn", "--rope-factor", "4", "--rope-original-max-position", "64", "--rope-beta-slow",
            "0.1"},
           {"--rope-scaling", "yarn", "--rope-factor", "4", "--rope-original-max-position", "64",
            "--rope-attention-factor", "2"}}) {
    // Block size 8 and top-k 3, unless the options under test say something else.
    std::vector<std::string> arguments{"run", folder.file("in"), "-o", folder.file("out"), "--quiet"};
    for (const auto& [name, value] : {std::pair{"--block-size", "8"}, std::pair{"--top-k", "3"}}) {
      if (std::find(options.begin(), options.end(), name) == options.end())
        arguments.insert(arguments.end(), {name, value});
    }
    arguments.insert(arguments.end(), options.begin(), options.end());
    expect_success(run_moba(arguments));
    results.push_back(read_floats(SafetensorsReader(folder.file("out")), "out"));
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    for (std::size_t j = i + 1; j < results.size(); ++j) EXPECT_NE(results[i], results[j]) << i << " and " << j;
  }
}

TEST(Cli, ThreadsAndSpellingsOfThePackDoNotChangeTheResult) {
  const TemporaryFolder folder;
  SmallInput input;
  input.offsets["cu_seqlens"] = {0, 0, 1, 40, 64};
  input.write(folder.file("in"));
  input.offsets = {{"cu_seqlens_q", {0, 0, 1, 40, 64}}, {"cu_seqlens_k", {0, 0, 1, 40, 64}}};
  input.write(folder.file("in2"));
  const auto result = [&](const std::string& in, const std::string& threads) {
    expect_success(run_moba(
        {"run", folder.file(in), "-o", folder.file("out"), "--block-size", "4", "--top-k", "3", "--threads", threads}));
    return read_bytes(folder.file("out"));
  };
  const std::string expected = result("in", "1");
  EXPECT_EQ(result("in", "3"), expected);
  EXPECT_EQ(result("in2", "2"), expected);
}

TEST(Cli, TakesEmptyInput) {
  const TemporaryFolder folder;
  SmallInput input;
  input.tq = input.tk = 0;
  input.write(folder.file("none"));
  input.offsets["cu_seqlens"] = {0};
  input.write(folder.file("no-sequence"));
  for (const char* name : {"none", "no-sequence"}) {
    for (const char* command : {"run", "dense"}) {
      expect_success(run_moba({command, folder.file(name), "-o", folder.file("out")}));
      EXPECT_EQ(describe(*SafetensorsReader(folder.file("out")).find("out")), "F32 [0, 4, 16]");
    }
    expect_success(run_moba({"compare", folder.file(name)}));
  }
  expect_success(run_moba({"map", folder.file("none"), "-o", folder.file("map.svg")}));
}

TEST(Cli, CompareReportsSpeedErrorAndMass) {
  const TemporaryFolder folder;
  SmallInput input;
  input.tq = 50;
  input.tk = 90;
  input.offsets = {{"cu_seqlens_q", {0, 20, 50}}, {"cu_seqlens_k", {0, 30, 90}}};
  input.write(folder.file("in"));
  for (const char* rows : {"0", "1", "7", "35", "50", "1000"}) {
    const Finished run = run_moba({"compare", folder.file("in"), "--block-size", "8", "--top-k", "2", "--rope",
                                   "--check-rows", rows, "--svg", folder.file("map.svg"), "--repeat", "1"});
    expect_success(run);
    EXPECT_NE(run.out.find("speed-up over dense"), std::string::npos);
    EXPECT_NE(run.out.find("share of the dense attention mass"), std::string::npos);
    const std::string checked = std::to_string(4 * std::min(50, std::atoi(rows))) + " of ";
    const std::string same = "same blocks as float64 in " + checked;
    EXPECT_EQ(run.out.find(same) != std::string::npos, std::string(rows) != "0") << run.out;
    const int tokens = std::atoi(rows);
    const std::string which = tokens >= 50 ? "over all 50 query" : "over the last " + std::string(rows) + " query";
    EXPECT_EQ(run.out.find(which) != std::string::npos, tokens != 0) << run.out;
  }
  EXPECT_NE(read_bytes(folder.file("map.svg")).find("</svg>"), std::string::npos);
}

TEST(Cli, CompareChecksTheLastTokensUnlessTold) {
  const TemporaryFolder folder;
  SmallInput input;
  input.tq = input.tk = 4100;
  input.q_heads = input.kv_heads = 1;
  input.d = 8;
  input.write(folder.file("in"));
  const Finished run = run_moba({"compare", folder.file("in"), "--repeat", "1"});
  expect_success(run);
  EXPECT_NE(run.out.find("over the last 4096 query tokens (4096 rows)"), std::string::npos) << run.out;
  EXPECT_NE(run_moba({"compare", "--help"}).out.find("(default 4096)"), std::string::npos);
}

TEST(Cli, MapDrawsOnePanelPerHead) {
  const TemporaryFolder folder;
  SmallInput input;
  input.offsets["cu_seqlens"] = {0, 10, 64};
  input.write(folder.file("in"));
  expect_success(run_moba({"map", folder.file("in"), "-o", folder.file("map.svg"), "--block-size", "4", "--top-k", "3",
                           "--sequence", "1"}));
  const std::string svg = read_bytes(folder.file("map.svg"));
  EXPECT_EQ(svg.rfind("<svg ", 0), 0u);
  for (const char* text : {"head 0", "head 3", "% kept", "sequence 1: 54 queries, 54 keys", "prefers-color-scheme"}) {
    EXPECT_NE(svg.find(text), std::string::npos) << text;
  }
  EXPECT_EQ(svg.find("head 4"), std::string::npos);
}

TEST(Cli, MapStaysSmall) {
  const TemporaryFolder folder;
  SmallInput input;
  input.tq = input.tk = 4096;
  input.q_heads = 24;
  input.kv_heads = 1;
  input.d = 8;
  input.write(folder.file("in"));
  expect_success(
      run_moba({"map", folder.file("in"), "-o", folder.file("map.svg"), "--block-size", "4", "--top-k", "9"}));
  EXPECT_LT(std::filesystem::file_size(folder.file("map.svg")), 1'000'000u);
}

TEST(Cli, PlanStatesMemoryAndArithmetic) {
  const Finished run =
      run_moba({"plan", "tokens=1024,q_heads=4 kv_heads=2, d=64 block=64 topk=4 dtype=bf16 threads=2"});
  expect_success(run);
  for (const char* text : {"q            512.0 KiB", "workspace", "selection", "attend", "dense / MoBA", "2 threads"}) {
    EXPECT_NE(run.out.find(text), std::string::npos) << text << "\n" << run.out;
  }
  expect_success(run_moba({"plan", "tq=1 tk=100000 batch=16 q_heads=32 kv_heads=8"}));
  expect_success(run_moba({"plan", "tokens=0 batch=0"}));
  const auto begin = std::chrono::steady_clock::now();
  expect_success(run_moba({"plan", "tokens=2147483647"}));
  expect_success(run_moba({"plan", "tokens=2147483647 block=1 topk=1000000"}));
  expect_success(run_moba({"plan", "tokens=1 batch=1048576"}));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));  // whatever else runs here
}

TEST(Cli, BenchTimesEveryStage) {
  const TemporaryFolder folder;
  const std::string problem = "tokens=100 batch=2 q_heads=4 kv_heads=2 d=16 block=16 topk=2 rope_base=10000";
  const Finished run = run_moba({"bench", problem, "--repeat", "2", "--json", folder.file("bench.json")});
  expect_success(run);
  const nlohmann::json report = nlohmann::json::parse(read_bytes(folder.file("bench.json")));
  std::vector<std::string> names;
  for (const auto& stage : report.at("stages")) {
    names.push_back(stage.at("name"));
    EXPECT_LE(stage.at("min_s"), stage.at("median_s"));
  }
  EXPECT_EQ(names, (std::vector<std::string>{"rope", "pool", "gate", "index", "attend", "total", "dense"}));
  for (const char* key : {"version", "processor", "kernels", "threads", "problem"}) EXPECT_TRUE(report.contains(key));

  const Finished alone = run_moba({"bench", problem + " dtype=f16 backend=reference", "--repeat", "1", "--no-dense"});
  expect_success(alone);
  EXPECT_EQ(alone.out.find("dense"), std::string::npos) << alone.out;
  EXPECT_EQ(alone.out.find("backward"), std::string::npos) << alone.out;

  for (const std::string& some_or_all : {problem, std::string("tokens=100 q_heads=4 d=16 block=16 topk=7")}) {
    const Finished trained = run_moba({"bench", some_or_all, "--repeat", "2", "--backward"});
    expect_success(trained);
    const std::size_t backward = trained.out.find("\nbackward "), dense = trained.out.find("\ndense ");
    EXPECT_LT(backward, dense) << trained.out;
    EXPECT_NE(dense, std::string::npos) << trained.out;
  }
}

TEST(Cli, InfoSaysWhatABugReportNeeds) {
  const Finished run = run_moba({"info"});
  expect_success(run);
  for (const char* key :
       {"version", "compiler", "build type", "processor", "cores", "cpu targets", "backends", "cuda"}) {
    EXPECT_NE(run.out.find(key), std::string::npos) << key;
  }
}

// The golden vectors through the program: the parameters from the file's metadata, the results against its tensors.
class CliGolden : public testing::TestWithParam<const char*> {};

std::vector<std::string> options_of(const std::map<std::string, std::string>& metadata) {
  std::vector<std::string> options;
  for (const auto& [key, value] : metadata) {
    if (key == "causal") {
      if (value == "false") options.emplace_back("--no-causal");
    } else if (key == "rope_rotary_dim") {
      options.insert(options.end(), {"--rope-dim", value});
    } else if (key == "block_size" || key == "top_k" || key == "scale" || key.rfind("rope_", 0) == 0) {
      std::string name = "--" + key;
      std::replace(name.begin(), name.end(), '_', '-');
      options.insert(options.end(), {name, value});
    }
  }
  return options;
}

bool served_on_cuda(const SafetensorsReader& golden) {
  const FileTensor& q = *golden.find("q");
  return q.dtype != "F32" && q.shape[2] % 32 == 0;
}

TEST_P(CliGolden, RunGivesTheExpectedResults) {
  const bool on_cuda = std::string_view(GetParam()) == "cuda";
  if (on_cuda && cuda_support().devices.empty()) GTEST_SKIP() << cuda_support().problem;
  const TemporaryFolder folder;
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(MOBA_GOLDEN_DIR)) {
    if (entry.path().extension() != ".safetensors") continue;
    SCOPED_TRACE(entry.path().string());
    const SafetensorsReader golden(entry.path().string());
    if (on_cuda && !served_on_cuda(golden)) continue;
    ++files;
    std::vector<std::string> arguments{"run",         golden.path(), "-o",      folder.file("out"),
                                       "--selection", "--backend",   GetParam()};
    const std::vector<std::string> options = options_of(golden.metadata());
    arguments.insert(arguments.end(), options.begin(), options.end());
    expect_success(run_moba(arguments));
    const SafetensorsReader result(folder.file("out"));
    const FileTensor& q = *golden.find("q");
    const double tolerance = q.dtype == "F32" ? 1e-5 : (q.dtype == "F16" ? 2e-3 : 1e-2);
    EXPECT_EQ(read_ints(result, "ids"), read_ints(golden, "ids"));
    EXPECT_LE(
        largest_row_error(read_floats(result, "out"), read_floats(golden, "out"), static_cast<std::size_t>(q.shape[2])),
        tolerance);
    for (const auto& [key, value] : golden.metadata()) {
      if (key == "about" || key == "seed" || key == "key_patterns") continue;
      EXPECT_EQ(result.metadata().at(key), value) << key;
    }
  }
  EXPECT_GT(files, 0u);
}

INSTANTIATE_TEST_SUITE_P(Backends, CliGolden, testing::Values("cpu", "reference", "cuda"));

}  // namespace
}  // namespace moba::cli
