// The program and the cuda backend: what it says where there is no GPU, what it computes where there is one.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moba/info.h"
#include "support.h"

namespace moba::cli {
namespace {

TEST(CliCuda, InfoSaysWhatThereIs) {
  const CudaSupport cuda = cuda_support();
  const Finished run = run_moba({"info"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_NE(run.out.find("\ncuda "), std::string::npos) << run.out;
  EXPECT_NE(run.out.find(cuda.problem), std::string::npos) << run.out;
  for (const CudaDevice& device : cuda.devices) {
    EXPECT_NE(run.out.find(std::to_string(device.index) + ": " + device.name), std::string::npos) << run.out;
  }
  EXPECT_EQ(run.out.find("cpu reference cuda") != std::string::npos, !cuda.devices.empty()) << run.out;

  EXPECT_EQ(run_moba({"info", "--backend", "reference"}).code, 0);
  if (cuda.devices.empty()) {
    expect_refusal({"info", "--backend", "cuda"}, kRefused, "options.");
  } else {
    EXPECT_EQ(run_moba({"info", "--backend", "cuda"}).code, cuda.devices.front().index == 0 ? 0 : kRefused);
    expect_refusal({"info", "--backend", "cuda", "--device", "1000"}, kRefused, "options.cuda_device: is 1000");
  }
}

class CliCudaFile : public testing::Test {
 protected:
  CliCudaFile() {
    small_.tq = small_.tk = 300;
    small_.d = 64;
    small_.dtype = DType::bf16;
    small_.write(in_);
  }

  // `command` on the input, with the backend and blocks that are chosen among, and more.
  std::vector<std::string> arguments(const std::string& command, const std::vector<std::string>& more) const {
    std::vector<std::string> all{command, in_, "--rope"};
    if (command != "dense") all.insert(all.end(), {"--block-size", "32", "--top-k", "3"});
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }

  TemporaryFolder folder_;
  SmallInput small_;
  const std::string in_ = folder_.file("in"), out_ = folder_.file("out");
};

TEST_F(CliCudaFile, OptionsNeedTheBackend) {
  const std::string problem = "tokens=64 dtype=bf16";
  for (const std::vector<std::string>& option : std::vector<std::vector<std::string>>{
           {"--device", "0"}, {"--kernels", "portable"}, {"--workspace-limit", "1G"}}) {
    for (const std::vector<std::string>& command : std::vector<std::vector<std::string>>{{"run", in_, "-o", out_},
                                                                                         {"dense", in_, "-o", out_},
                                                                                         {"compare", in_},
                                                                                         {"backward", in_},
                                                                                         {"decode", in_},
                                                                                         {"map", in_, "-o", out_},
                                                                                         {"plan", problem},
                                                                                         {"bench", problem},
                                                                                         {"info"}}) {
      std::vector<std::string> all = command;
      all.insert(all.end(), option.begin(), option.end());
      expect_refusal(all, kWrongCommandLine, option[0] + ": needs --backend cuda");
    }
  }
  expect_refusal({"plan", problem + " backend=cpu", "--backend", "cuda", "--device", "0"}, kWrongCommandLine,
                 "--device: needs --backend cuda");
  if (cuda_support().devices.empty()) {  // the text says it: refused for want of a GPU only
    expect_refusal({"plan", problem + " backend=cuda", "--device", "0"}, kRefused, "options.backend");
  }
  const auto refuse = [&](const std::string& name, const std::string& value, const std::string& part) {
    expect_refusal({"plan", problem, "--backend", "cuda", name, value}, kWrongCommandLine, part);
  };
  refuse("--kernels", "sm80", "allowed: sm90, portable");
  refuse("--device", "-1", "--device");
  for (const char* size : {"0", "1.5G", "1GB", "", "-1"}) refuse("--workspace-limit", size, "--workspace-limit: is");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

TEST_F(CliCudaFile, EveryCommandSaysWhatIsMissing) {
  const CudaSupport cuda = cuda_support();
  if (!cuda.devices.empty()) GTEST_SKIP() << "there is a GPU";
  for (const char* command : {"run", "dense", "backward", "map"}) {
    expect_refusal(arguments(command, {"-o", out_, "--backend", "cuda"}), kRefused, "options.");
  }
  expect_refusal(arguments("compare", {"--backend", "cuda"}), kRefused, "options.");
  for (const char* command : {"plan", "bench"}) {
    expect_refusal({command, "--backend", "cuda", "tokens=64 dtype=bf16"}, kRefused, "options.");
    expect_refusal({command, "backend=cuda tokens=64 dtype=bf16"}, kRefused, "options.");
  }
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

// With a GPU or without one.
TEST_F(CliCudaFile, WhatOnlyTheHostDoesIsRefused) {
  expect_refusal(arguments("decode", {"--backend", "cuda"}), kRefused,
                 "moba: --backend: is cuda; allowed: cpu, reference: there is no cache on a GPU yet\n");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

// ---- Where there is a GPU. ----

class CliOnGpu : public CliCudaFile {
 protected:
  void SetUp() override {
    if (cuda_support().devices.empty()) GTEST_SKIP() << cuda_support().problem;
    device_ = std::to_string(cuda_support().devices.front().index);
    families_ = {"portable"};
    if (cuda_support().devices.front().kernels == "sm90") families_.emplace_back("sm90");
  }

  Finished on_gpu(const std::string& command, std::vector<std::string> more) const {
    more.insert(more.end(), {"--backend", "cuda", "--device", device_});
    return run_moba(arguments(command, more));
  }

  std::string device_;
  std::vector<std::string> families_;
};

// The rows of `d` values for which both have the same ids, `slots` of them to a row.
std::vector<float> rows_alike(const std::vector<float>& values, std::size_t d, const std::vector<std::int32_t>& ids,
                              const std::vector<std::int32_t>& others, std::size_t slots) {
  std::vector<float> alike;
  for (std::size_t row = 0; row * slots < ids.size(); ++row) {
    const auto first = static_cast<std::ptrdiff_t>(row * slots), last = static_cast<std::ptrdiff_t>((row + 1) * slots);
    if (!std::equal(ids.begin() + first, ids.begin() + last, others.begin() + first)) continue;
    alike.insert(alike.end(), values.begin() + static_cast<std::ptrdiff_t>(row * d),
                 values.begin() + static_cast<std::ptrdiff_t>((row + 1) * d));
  }
  return alike;
}

TEST_F(CliOnGpu, RunGivesWhatTheReferenceGives) {
  ASSERT_EQ(run_moba(arguments("run", {"-o", out_, "--selection", "--backend", "reference"})).code, 0);
  const SafetensorsReader expected(out_);
  const std::vector<std::int32_t> expected_ids = read_ints(expected, "ids");
  for (const std::string& family : families_) {
    SCOPED_TRACE(family);
    const std::string file = folder_.file(family);
    const Finished run = on_gpu("run", {"-o", file, "--selection", "--kernels", family});
    ASSERT_EQ(run.code, 0) << run.err;
    EXPECT_NE(run.out.find("TFLOP/s"), std::string::npos) << run.out;
    const SafetensorsReader result(file);
    const std::vector<std::int32_t> ids = read_ints(result, "ids");
    ASSERT_EQ(ids.size(), expected_ids.size());
    const std::vector<float> out = rows_alike(read_floats(result, "out"), 64, ids, expected_ids, 3);
    EXPECT_GT(out.size(), 300u * 4 * 64 * 98 / 100) << "scores that are nearly equal may be rounded to another order";
    EXPECT_LT(largest_row_error(out, rows_alike(read_floats(expected, "out"), 64, ids, expected_ids, 3), 64), 1e-2);
  }
}

TEST_F(CliOnGpu, DenseGivesWhatTheReferenceGives) {
  ASSERT_EQ(run_moba(arguments("dense", {"-o", out_, "--backend", "reference"})).code, 0);
  const SafetensorsReader expected(out_);
  for (const std::string& family : families_) {
    SCOPED_TRACE(family);
    const std::string file = folder_.file(family);
    const Finished run = on_gpu("dense", {"-o", file, "--kernels", family});
    ASSERT_EQ(run.code, 0) << run.err;
    const SafetensorsReader result(file);
    EXPECT_LT(largest_row_error(read_floats(result, "out"), read_floats(expected, "out"), 64), 1e-2);
    EXPECT_LT(largest_row_error(read_floats(result, "lse"), read_floats(expected, "lse"), 300), 1e-2);
  }
}

TEST_F(CliOnGpu, LessWorkspaceGivesTheSameBits) {
  ASSERT_EQ(on_gpu("run", {"-o", out_, "--selection", "--quiet"}).code, 0);
  ASSERT_EQ(on_gpu("run", {"-o", folder_.file("less"), "--selection", "--quiet", "--workspace-limit", "1M"}).code, 0);
  EXPECT_EQ(read_bytes(out_), read_bytes(folder_.file("less")));
  const Finished none = on_gpu("run", {"-o", folder_.file("none"), "--workspace-limit", "1"});
  EXPECT_EQ(none.code, kRefused);
  EXPECT_NE(none.err.find("options.workspace_limit: is 1 bytes"), std::string::npos) << none.err;
}

TEST_F(CliOnGpu, CompareTimesTheStagesAndTheWhole) {
  for (const std::string& family : families_) {
    const Finished run = on_gpu("compare", {"--kernels", family, "--svg", folder_.file("map.svg")});
    ASSERT_EQ(run.code, 0) << run.err;
    for (const char* line : {"\nrope ", "\nattend ", "\ntotal ", "\nforward ", "\ndense ", "speed-up over dense",
                             "same blocks as float64 in 1", "share of the dense attention mass"}) {
      EXPECT_NE(run.out.find(line), std::string::npos) << line << "\n" << run.out;
    }
    EXPECT_EQ(run.out.find("not finite"), std::string::npos) << run.out;
    EXPECT_NE(read_bytes(folder_.file("map.svg")).find("</svg>"), std::string::npos);
  }
  EXPECT_EQ(on_gpu("map", {"-o", folder_.file("map.svg")}).code, 0);
}

TEST_F(CliOnGpu, BackwardErrorsAreThoseThatTheOperatorAllows) {
  small_.tk = 350;
  small_.offsets = {{"cu_seqlens_q", {0, 120, 120, 300}}, {"cu_seqlens_k", {0, 140, 170, 350}}};
  for (const DType dtype : {DType::f16, DType::bf16}) {
    small_.dtype = dtype;
    small_.write(in_);
    for (const std::string& family : families_) {
      for (const std::vector<std::string>& more : std::vector<std::vector<std::string>>{
               {}, {"--no-causal"}, {"--rope-style", "interleaved", "--rope-dim", "32"}}) {
        SCOPED_TRACE(::testing::Message() << name(dtype) << ", " << family);
        std::vector<std::string> options{"--kernels", family, "--check", "always"};
        options.insert(options.end(), more.begin(), more.end());
        const Finished run = on_gpu("backward", options);
        ASSERT_EQ(run.code, 0) << run.err;
        expect_gradient_errors(run, dtype);
        for (const char* text : {"\nforward ", "\nbackward ", "TFLOP/s", "\nmemory: workspace ", "; selection "}) {
          EXPECT_NE(run.out.find(text), std::string::npos) << text << "\n" << run.out;
        }
      }
    }
  }
}

// Where there is nothing to choose: full attention.
TEST_F(CliOnGpu, BackwardOfEveryBlock) {
  const Finished run =
      run_moba({"backward", in_, "--block-size", "512", "--backend", "cuda", "--device", device_, "--check", "always"});
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_NE(run.out.find("\ndense "), std::string::npos) << run.out;
  expect_gradient_errors(run, DType::bf16);
}

TEST_F(CliOnGpu, BackwardWritesTheSameBitsAgain) {
  ASSERT_EQ(on_gpu("backward", {"-o", out_, "--quiet"}).code, 0);
  ASSERT_EQ(on_gpu("backward", {"-o", folder_.file("again"), "--quiet", "--repeat", "1"}).code, 0);
  EXPECT_EQ(read_bytes(out_), read_bytes(folder_.file("again")));
  const SafetensorsReader result(out_);
  EXPECT_EQ(describe(*result.find("dq")), "BF16 [300, 4, 64]");
  EXPECT_EQ(describe(*result.find("dv")), "BF16 [300, 2, 64]");
  EXPECT_EQ(describe(*result.find("lse")), "F32 [4, 300]");
  EXPECT_EQ(result.metadata().at("seed"), "1");
  const Finished none = on_gpu("backward", {"-o", folder_.file("none"), "--workspace-limit", "1"});
  EXPECT_EQ(none.code, kRefused);
  EXPECT_NE(none.err.find("options.workspace_limit: is 1 bytes"), std::string::npos) << none.err;
}

TEST_F(CliOnGpu, PlanAndBench) {
  const std::string problem = "tokens=1000 batch=2 q_heads=4 kv_heads=2 d=64 block=64 topk=3 dtype=f16 rope_base=10000";
  const Finished plan = run_moba({"plan", problem, "--backend", "cuda", "--device", device_});
  ASSERT_EQ(plan.code, 0) << plan.err;
  EXPECT_NE(plan.out.find("kernels  cuda ("), std::string::npos) << plan.out;
  const Finished run = run_moba(
      {"bench", problem, "--backend", "cuda", "--device", device_, "--repeat", "2", "--json", folder_.file("json")});
  ASSERT_EQ(run.code, 0) << run.err;
  const nlohmann::json report = nlohmann::json::parse(read_bytes(folder_.file("json")));
  std::vector<std::string> names;
  for (const auto& stage : report.at("stages")) {
    names.push_back(stage.at("name"));
    EXPECT_GT(stage.at("min_s"), 0.0);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"rope", "pool", "gate", "index", "attend", "total", "forward", "dense"}));
}

TEST_F(CliOnGpu, WhatItDoesNotServeIsRefused) {
  small_.dtype = DType::f32;
  small_.write(in_);
  const Finished run = on_gpu("run", {"-o", out_});
  EXPECT_EQ(run.code, kRefused);
  EXPECT_NE(run.err.find("dtype: is f32"), std::string::npos) << run.err;
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

}  // namespace
}  // namespace moba::cli
