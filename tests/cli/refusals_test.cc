// The program as a user runs it: what it refuses. Always one line on standard error, a code that is not 0, and no file.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "support.h"

namespace moba::cli {
namespace {

class CliRefusal : public testing::Test {
 protected:
  CliRefusal() { SmallInput{}.write(in_); }

  // Refused with `options` after a command line that is right otherwise, and nothing written.
  void refuse(const std::vector<std::string>& options, int code, const std::string& part) {
    std::vector<std::string> arguments{"run", in_, "-o", out_};
    arguments.insert(arguments.end(), options.begin(), options.end());
    expect_refusal(arguments, code, part);
    EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
  }
  // Refused for the bytes of its input.
  void refuse_file(const std::string& bytes, const std::string& part) {
    write_bytes(in_, bytes);
    refuse({}, kRefused, part);
  }

  TemporaryFolder folder_;
  const std::string in_ = folder_.file("in"), out_ = folder_.file("out");
};

TEST_F(CliRefusal, Commands) {
  expect_refusal({}, kWrongCommandLine, "a command is wanted");
  expect_refusal({"nope"}, kWrongCommandLine, "'nope'");
  expect_refusal({"--nope"}, kWrongCommandLine, "--nope");
  expect_refusal({"run"}, kWrongCommandLine, "IN is required (see moba run --help)");
  expect_refusal({"run", in_}, kWrongCommandLine, "--output");
  expect_refusal({"run", in_, "-o"}, kWrongCommandLine, "--output");
  expect_refusal({"dense", in_, "-o", out_, "--top-k", "3"}, kWrongCommandLine, "--top-k");
  expect_refusal({"info", "more"}, kWrongCommandLine, "more");
  expect_refusal({"plan"}, kWrongCommandLine, "PROBLEM");
}

TEST_F(CliRefusal, Numbers) {
  for (const char* text : {"0", "-1", "1.5", "x", "", "1x", " 1", "0x10", "9223372036854775808", "1e3"}) {
    refuse({"--block-size", text}, kWrongCommandLine, "--block-size");
    refuse({"--top-k", text}, kWrongCommandLine, "--top-k");
  }
  for (const char* text : {"nan", "inf", "-inf", "x", "", "1e999", "1 2"}) {
    refuse({"--scale", text}, kWrongCommandLine, "--scale");
    refuse({"--rope-base", text}, kWrongCommandLine, "--rope-base");
  }
  for (const char* text : {"-1", "x", "4294967296"}) refuse({"--threads", text}, kWrongCommandLine, "--threads");
  refuse({"--threads", "1000000"}, kRefused, "threads");
  refuse({"--top-k", "3", "--top-k", "4"}, kWrongCommandLine, "--top-k");
}

TEST_F(CliRefusal, Choices) {
  refuse({"--backend", "gpu"}, kWrongCommandLine, "allowed: cpu, reference, cuda");
  refuse({"--bf16-products", "fast"}, kWrongCommandLine, "auto, widen, dot");
  refuse({"--bf16-products", "dot"}, kRefused, "bf16_products");  // the input is float32
  refuse({"--cpu-target", "nope"}, kRefused, "cpu_target");
  refuse({"--bogus"}, kWrongCommandLine, "--bogus");
  refuse({"extra"}, kWrongCommandLine, "extra");
}

TEST_F(CliRefusal, Rope) {
  refuse({"--rope-style", "neox"}, kWrongCommandLine, "half-split, interleaved");
  refuse({"--rope-scaling", "ntk"}, kWrongCommandLine, "llama3");
  refuse({"--rope-scaling", "yarn"}, kWrongCommandLine, "--rope-factor");
  refuse({"--rope-factor", "2"}, kWrongCommandLine, "--rope-factor");
  refuse({"--rope-scaling", "linear", "--rope-factor", "2", "--rope-beta-fast", "3"}, kWrongCommandLine,
         "--rope-beta-fast");
  refuse({"--rope-scaling", "linear", "--rope-factor", "0.5"}, kRefused, "factor");
  refuse({"--rope-scaling", "llama3", "--rope-factor", "2", "--rope-low-freq-factor", "9"}, kRefused, "freq_factor");
  refuse({"--rope-dim", "3"}, kRefused, "rotary_dim");
  refuse({"--rope-dim", "18"}, kRefused, "rotary_dim");
  refuse({"--rope-base", "0"}, kRefused, "base");
}

TEST_F(CliRefusal, Paths) {
  expect_refusal({"run", folder_.file("nowhere"), "-o", out_}, kRefused, "nowhere: cannot open");
  expect_refusal({"run", folder_.path(), "-o", out_}, kRefused, "not a regular file");
  expect_refusal({"run", "/dev/zero", "-o", out_}, kRefused, "not a regular file");
  expect_refusal({"run", in_, "-o", folder_.file("no/out")}, kRefused, "no does not exist");
  expect_refusal({"run", in_, "-o", folder_.path()}, kRefused, "not a regular file");
  expect_refusal({"run", in_, "-o", folder_.file("sub/")}, kRefused, "sub");
  expect_refusal({"run", in_, "-o", "/dev/null"}, kRefused, "not a regular file");
  expect_refusal({"run", in_, "-o", ""}, kRefused, "empty");
  expect_refusal({"run", in_, "-o", folder_.file(std::string(400, 'x'))}, kRefused, "too long");
  expect_refusal({"map", in_, "-o", folder_.file("no/map.svg")}, kRefused, "does not exist");
  expect_refusal({"compare", in_, "--svg", folder_.file("no/map.svg")}, kRefused, "does not exist");
  expect_refusal({"bench", "tokens=16", "--json", folder_.file("no/x.json")}, kRefused, "does not exist");
  std::filesystem::create_symlink(folder_.file("gone"), folder_.file("link"));
  expect_refusal({"run", in_, "-o", folder_.file("link")}, kRefused, "link");
  EXPECT_EQ(folder_.names(), (std::vector<std::string>{"in", "link"}));
}

TEST_F(CliRefusal, OutputsOverTheirInput) {
  const std::string before = read_bytes(in_);
  std::filesystem::create_symlink(in_, folder_.file("link"));
  for (const std::string& output : {in_, folder_.path() + "/./in", folder_.file("link")}) {
    expect_refusal({"run", in_, "-o", output}, kRefused, "is the input file");
    expect_refusal({"dense", in_, "-o", output}, kRefused, "is the input file");
    expect_refusal({"map", in_, "-o", output}, kRefused, "is the input file");
    expect_refusal({"compare", in_, "--svg", output}, kRefused, "is the input file");
  }
  EXPECT_EQ(read_bytes(in_), before);
}

TEST_F(CliRefusal, TheInputIsNotReadForAnOutputThatCannotBe) {
  expect_refusal({"run", folder_.file("nowhere"), "-o", folder_.file("no/out")}, kRefused, "no/out");
}

TEST_F(CliRefusal, ANameWithALineBreakStaysOneLine) {
  expect_refusal({"run", folder_.file("a\nb"), "-o", out_}, kRefused, "a\\x0ab");
  expect_refusal({"plan", "to\nkens=3"}, kRefused, "key=value");
}

// A file that may not grow beyond 1 KiB stands for a full disk.
TEST_F(CliRefusal, AFullDiskLeavesNothing) {
  expect_refusal({"run", in_, "-o", out_}, kRefused, "cannot write", "ulimit -f 1");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
  write_bytes(out_, "old");
  expect_refusal({"run", in_, "-o", out_}, kRefused, "cannot write", "ulimit -f 1");
  EXPECT_EQ(read_bytes(out_), "old");
  EXPECT_EQ(folder_.names(), (std::vector<std::string>{"in", "out"}));
}

TEST_F(CliRefusal, FilesThatAreNoSafetensors) {
  const std::string good = read_bytes(in_);
  refuse_file("", "shorter than 8 bytes");
  refuse_file("garbage, not a tensor file at all", "not a safetensors file");
  refuse_file(good.substr(0, 100), "cut short");
  refuse_file(good.substr(0, good.size() - 1), "bytes of data");
  refuse_file(good + "x", "bytes of data");
  refuse_file(safetensors_bytes("{\"x\":" + std::string(1'000'000, '['), ""), "an array");
  refuse_file(safetensors_bytes("not json", ""), "does not begin with {");
  refuse_file(safetensors_bytes("{]", ""), "not valid JSON");
  // What the program does not use must be right as well.
  refuse_file(safetensors_bytes(R"({"other":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}})", "1234"), "F99");
}

TEST_F(CliRefusal, TensorsThatDoNotFit) {
  const auto header = [](const std::string& q, const std::string& k, const std::string& v,
                         const std::string& more = "") {
    return "{\"q\":" + q + ",\"k\":" + k + ",\"v\":" + v + more + "}";
  };
  const std::string q = R"({"dtype":"F32","shape":[2,2,8],"data_offsets":[0,128]})";
  const std::string k = R"({"dtype":"F32","shape":[2,1,8],"data_offsets":[128,192]})";
  const std::string v = R"({"dtype":"F32","shape":[2,1,8],"data_offsets":[192,256]})";
  const std::string data(256, '\0');
  refuse_file(safetensors_bytes("{\"q\":" + q + "}", data.substr(0, 128)), "k: the file has no such tensor");
  refuse_file(safetensors_bytes(header(R"({"dtype":"F32","shape":[4,8],"data_offsets":[0,128]})", k, v), data),
              "q: is");
  refuse_file(safetensors_bytes(header(R"({"dtype":"F64","shape":[1,2,8],"data_offsets":[0,128]})", k, v), data),
              "q: dtype is F64");
  refuse_file(safetensors_bytes(header(q, R"({"dtype":"F16","shape":[4,1,8],"data_offsets":[128,192]})", v), data),
              "k: ");
  refuse_file(safetensors_bytes(header(q, k, R"({"dtype":"F32","shape":[1,2,8],"data_offsets":[192,256]})"), data),
              "v: ");
  refuse_file(safetensors_bytes(header(q, k, R"({"dtype":"F32","shape":[1,1,16],"data_offsets":[192,256]})"), data),
              "v: ");
  refuse_file(safetensors_bytes(header(R"({"dtype":"F32","shape":[4,2,4],"data_offsets":[0,128]})", k, v), data),
              "head_dim");
  refuse_file(safetensors_bytes(header(R"({"dtype":"F32","shape":[1,0,8],"data_offsets":[0,0]})",
                                       R"({"dtype":"F32","shape":[1,0,8],"data_offsets":[0,0]})",
                                       R"({"dtype":"F32","shape":[1,0,8],"data_offsets":[0,0]})"),
                                ""),
              "heads");
}

TEST_F(CliRefusal, Sequences) {
  SmallInput input;
  const auto refuse_offsets = [&](std::map<std::string, std::vector<std::int32_t>> offsets, const std::string& part) {
    input.offsets = std::move(offsets);
    input.write(in_);
    refuse({}, kRefused, part);
  };
  refuse_offsets({{"cu_seqlens", {}}}, "cu_seqlens: is I32 [0]");
  refuse_offsets({{"cu_seqlens", {1, 64}}}, "cu_seqlens_q");
  refuse_offsets({{"cu_seqlens", {0, 63}}}, "cu_seqlens_q");
  refuse_offsets({{"cu_seqlens", {0, 40, 30, 64}}}, "cu_seqlens_q");
  refuse_offsets({{"cu_seqlens", {0, -5, 64}}}, "cu_seqlens_q");
  refuse_offsets({{"cu_seqlens", {0}}}, "batch");
  refuse_offsets({{"cu_seqlens_q", {0, 64}}}, "cu_seqlens_k: is missing");
  refuse_offsets({{"cu_seqlens_k", {0, 64}}}, "cu_seqlens_q: is missing");
  refuse_offsets({{"cu_seqlens", {0, 64}}, {"cu_seqlens_q", {0, 64}}}, "cu_seqlens: is there beside");
  refuse_offsets({{"cu_seqlens_q", {0, 64}}, {"cu_seqlens_k", {0, 30, 64}}}, "as many entries");
  refuse_offsets({{"cu_seqlens_q", {0, 30, 64}}, {"cu_seqlens_k", {0, 70, 64}}}, "cu_seqlens_k");
}

TEST_F(CliRefusal, MapAndCompare) {
  expect_refusal({"map", in_, "-o", out_, "--sequence", "1"}, kRefused, "--sequence: is 1");
  expect_refusal({"map", in_, "-o", out_, "--sequence", "-1"}, kWrongCommandLine, "--sequence");
  expect_refusal({"compare", in_, "--repeat", "0"}, kWrongCommandLine, "--repeat");
  expect_refusal({"compare", in_, "--check-rows", "-1"}, kWrongCommandLine, "--check-rows");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

TEST_F(CliRefusal, Problems) {
  for (const char* command : {"plan", "bench"}) {
    const auto refused = [&](const char* text, const char* part) { expect_refusal({command, text}, kRefused, part); };
    refused("", "neither tokens nor tq");
    refused("tokens", "'tokens' is not a pair key=value");
    refused("tokens=5 =3", "unknown key ''");
    refused("tokens=", "tokens: is ''");
    refused("tokens=-1", "tokens: is '-1'");
    refused("tokens=5 tokens=5", "tokens is there twice");
    refused("tokens=5 colour=3", "unknown key 'colour'; allowed: tokens,");
    refused("tq=5", "neither tokens nor tk");
    refused("tokens=5 tq=5 tk=5", "tq and tk say it all");
    refused("tokens=5 dtype=f64", "allowed: f32, f16, bf16");
    refused("tokens=5 causal=2", "causal");
    refused("tokens=5 scale=big", "scale");
    refused("tokens=5 block=0", "block");
    refused("tokens=5 topk=0", "topk");
    refused("tokens=5 q_heads=3 kv_heads=2", "q_heads");
    refused("tokens=5 d=4", "head_dim");
    refused("tokens=5 target=nope", "cpu_target");
    refused("tokens=5 backend=gpu", "allowed: cpu, reference, cuda");
    refused("tokens=5 kernels=sm80", "allowed: sm90, portable");
    refused("tokens=5 backend=reference workspace_limit=1G", "workspace_limit needs backend=cuda, but it is reference");
    refused("tokens=5 workspace_limit=1GB", "workspace_limit: is '1GB'");
    refused("tokens=1099511627776 batch=1048576 q_heads=1048576", "total_q");
    refused("tokens=1099511627777", "tokens");
  }
  expect_refusal({"bench", "tokens=16", "--repeat", "0"}, kWrongCommandLine, "--repeat");
  expect_refusal({"bench", "tokens=33554432 q_heads=64 d=256"}, kRefused, "memory");
}

TEST_F(CliRefusal, StandardOutputThatTakesNothing) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP();
  const std::string command = std::string(MOBA_CLI_PATH) + " info >/dev/full 2>" + folder_.file("err");
  EXPECT_NE(std::system(command.c_str()), 0);
  EXPECT_EQ(read_bytes(folder_.file("err")), "moba: cannot write to standard output\n");
}

}  // namespace
}  // namespace moba::cli
