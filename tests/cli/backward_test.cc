// moba backward: what it writes, what it says, what it refuses.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention_file.h"
#include "gradient_accuracy.h"
#include "support.h"

namespace moba::cli {
namespace {

class CliBackward : public testing::Test {
 protected:
  // Runs the command on `input`, with blocks that are chosen among unless `options` say something else.
  Finished backward(const std::vector<std::string>& options = {}) {
    input_.write(in_);
    return run_choosing({"backward", in_, "--repeat", "1"}, options);
  }
  // The bytes of the tensors that it writes.
  std::string written(const std::vector<std::string>& options) {
    std::vector<std::string> all{"-o", out_, "--quiet"};
    all.insert(all.end(), options.begin(), options.end());
    const Finished run = backward(all);
    EXPECT_EQ(run.code, 0) << run.err;
    EXPECT_EQ(run.out, "");
    return read_bytes(out_);
  }

  TemporaryFolder folder_;
  SmallInput input_;
  const std::string in_ = folder_.file("in"), out_ = folder_.file("out");
};

std::string tensor_bytes(const SafetensorsReader& file, const std::string& name) {
  const FileTensor* tensor = file.find(name);
  if (tensor == nullptr) return "no tensor " + name;
  const Buffer bytes = file.read(*tensor);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The library's way from the tensors of a file to its gradients, each in memory of its own.
struct Expected {
  Expected(const std::string& path, const AttentionOptions& attention) : file(read_attention_file(path)) {
    const Plan plan(file.problem(attention), attention.options);
    const Problem& p = plan.problem();
    const auto make = [&](Tensor& tensor, DType dtype, std::initializer_list<std::int64_t> shape) {
      tensor = Tensor(nullptr, dtype, shape);
      memory.emplace_back(bytes_of(tensor));
      tensor.data = memory.back().data();
    };
    make(outputs.out, p.dtype, {p.total_q, p.q_heads, p.head_dim});
    make(outputs.lse, DType::f32, {p.q_heads, p.total_q});
    make(gradients.dq, p.dtype, {p.total_q, p.q_heads, p.head_dim});
    make(gradients.dk, p.dtype, {p.total_k, p.kv_heads, p.head_dim});
    make(gradients.dv, p.dtype, {p.total_k, p.kv_heads, p.head_dim});
    dout = read_dout(path, dout_memory);
    const Buffer workspace(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes()));
    selection_memory = Buffer(plan.selection_bytes());
    selection = make_selection(plan, selection_memory.span());
    moba::forward(plan, file.inputs, selection, outputs, workspace.span());
    moba::backward(plan, file.inputs, selection, {outputs.out, outputs.lse}, dout, gradients, workspace.span());
  }

  AttentionFile file;
  std::vector<Buffer> memory;
  Buffer dout_memory, selection_memory;
  Selection selection;
  Outputs outputs;
  ConstTensor dout;
  Gradients gradients;
};

AttentionOptions small_blocks() {
  AttentionOptions attention;
  attention.config.block_size = 8;
  attention.config.top_k = 3;
  return attention;
}

TEST_F(CliBackward, WritesWhatTheLibraryGives) {
  input_.dout = true;
  input_.tq = 50;
  input_.tk = 90;
  input_.offsets = {{"cu_seqlens_q", {0, 20, 20, 50}}, {"cu_seqlens_k", {0, 30, 30, 90}}};
  AttentionOptions attention = small_blocks();
  attention.rope.emplace().base = 500;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    SCOPED_TRACE(name(dtype));
    input_.dtype = dtype;
    written({"--rope-base", "500"});
    const Expected expected(in_, attention);
    const SafetensorsReader result(out_);
    ASSERT_EQ(result.tensors().size(), 5u);
    for (const auto& [name, tensor] : {std::pair{"dq", expected.gradients.dq}, std::pair{"dk", expected.gradients.dk},
                                       std::pair{"dv", expected.gradients.dv}, std::pair{"out", expected.outputs.out},
                                       std::pair{"lse", expected.outputs.lse}}) {
      EXPECT_EQ(tensor_bytes(result, name), std::string(static_cast<const char*>(tensor.data), bytes_of(tensor)))
          << name;
    }
  }
  const SafetensorsReader result(out_);
  EXPECT_EQ(describe(*result.find("dq")), "BF16 [50, 4, 16]");
  EXPECT_EQ(describe(*result.find("dv")), "BF16 [90, 2, 16]");
  EXPECT_EQ(describe(*result.find("lse")), "F32 [4, 50]");
  EXPECT_EQ(result.metadata().at("rope_base"), "500");
  EXPECT_EQ(result.metadata().count("seed"), 0u);
}

TEST_F(CliBackward, MakesUpDoutFromTheSeed) {
  const std::string first = written({});
  EXPECT_EQ(written({"--seed", "1"}), first) << "the default";
  EXPECT_NE(written({"--seed", "2"}), first);
  EXPECT_EQ(SafetensorsReader(out_).metadata().at("seed"), "2");
  const std::string gradient = tensor_bytes(SafetensorsReader(out_), "dk");

  // The dout that was written gives the same gradients as a tensor of the input.
  const SafetensorsReader result(out_), given(in_);
  std::vector<Buffer> memory;
  std::vector<NamedTensor> tensors;
  for (const auto& [file, name] : {std::pair{&given, "q"}, {&given, "k"}, {&given, "v"}, {&result, "dout"}}) {
    const FileTensor& tensor = *file->find(name);
    memory.push_back(file->read(tensor));
    const auto& shape = tensor.shape;
    tensors.push_back({name, ConstTensor(memory.back().data(), DType::f32, {shape[0], shape[1], shape[2]})});
  }
  write_safetensors(folder_.file("with-dout"), tensors);
  const Finished run =
      run_moba({"backward", folder_.file("with-dout"), "-o", out_, "--block-size", "8", "--top-k", "3"});
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_NE(run.out.find("\ndout: the file's\n"), std::string::npos) << run.out;
  EXPECT_EQ(tensor_bytes(SafetensorsReader(out_), "dk"), gradient);
  EXPECT_EQ(SafetensorsReader(out_).find("dout"), nullptr);
}

TEST_F(CliBackward, ThreadsDoNotChangeTheResultAndOptionsDo) {
  const std::string expected = written({"--threads", "1"});
  EXPECT_EQ(written({"--threads", "3"}), expected);
  for (const std::vector<std::string>& options : std::vector<std::vector<std::string>>{{"--block-size", "4"},
                                                                                       {"--top-k", "1"},
                                                                                       {"--no-causal"},
                                                                                       {"--scale", "0.6"},
                                                                                       {"--rope"},
                                                                                       {"--backend", "reference"}}) {
    EXPECT_NE(written(options), expected) << options.front();
  }
}

TEST_F(CliBackward, ErrorsAreThoseThatTheOperatorAllows) {
  const std::vector<std::vector<std::string>> options{
      {},
      {"--no-causal"},
      {"--top-k", "100"},
      {"--rope"},
      {"--rope-style", "interleaved"},
      {"--rope-dim", "6"},
      {"--rope-scaling", "yarn", "--rope-factor", "4", "--rope-original-max-position", "64"}};
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const auto& [tq, tk] : {std::pair{64, 64}, std::pair{50, 90}, std::pair{90, 50}}) {
      for (const std::vector<std::string>& more : options) {
        input_.dtype = dtype;
        input_.tq = tq;
        input_.tk = tk;
        const Finished run = backward(more);
        ASSERT_EQ(run.code, 0) << run.err;
        expect_gradient_errors(run, dtype);
      }
    }
  }
}

TEST_F(CliBackward, SaysHowLongAndHowMuch) {
  const Finished run = backward({"--rope", "-o", out_});
  ASSERT_EQ(run.code, 0) << run.err;
  const std::string written = ": dq f32 [64, 4, 16], dk f32 [64, 2, 16], dv f32 [64, 2, 16], out f32 [64, 4, 16]";
  for (const std::string& text : std::vector<std::string>{
           "\nforward ", "\nbackward ", "\ntotal ", "GFLOP/s", "\nmemory: workspace ", " backward; selection ",
           "\ndout: random, seed 1\n", "max error", written + ", lse f32 [4, 64], dout f32 [64, 4, 16]\n"}) {
    EXPECT_NE(run.out.find(text), std::string::npos) << text << "\n" << run.out;
  }
  const Finished whole = backward({"--top-k", "8"});
  ASSERT_EQ(whole.code, 0) << whole.err;
  EXPECT_NE(whole.out.find("\ndense "), std::string::npos) << "there is nothing to choose\n" << whole.out;
  EXPECT_EQ(whole.out.find("selection"), std::string::npos) << whole.out;
}

TEST_F(CliBackward, ChecksWhenAsked) {
  for (const char* when : {"auto", "always"}) {
    const Finished run = backward({"--check", when});
    ASSERT_EQ(run.code, 0) << run.err;
    EXPECT_NE(run.out.find("max error"), std::string::npos) << run.out;
  }
  const Finished run = backward({"--check", "never"});
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.out.find("max error"), std::string::npos) << run.out;
  EXPECT_NE(run.out.find("\nnot held against float64: "), std::string::npos) << run.out;
}

TEST_F(CliBackward, TakesEmptyInput) {
  input_.tq = input_.tk = 0;
  EXPECT_EQ(backward({"-o", out_}).code, 0);
  EXPECT_EQ(describe(*SafetensorsReader(out_).find("dk")), "F32 [0, 2, 16]");
  input_.offsets["cu_seqlens"] = {0};
  EXPECT_EQ(backward().code, 0);
}

TEST_F(CliBackward, SaysThatRowsAreNotFinite) {
  const Finished run = backward({"--scale", "1e38"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_NE(run.out.find("rows not finite"), std::string::npos) << run.out;
}

TEST_F(CliBackward, Refusals) {
  input_.dout = true;
  input_.write(in_);
  const auto refuse = [&](std::vector<std::string> arguments, int code, const std::string& message) {
    arguments.insert(arguments.begin(), "backward");
    expect_refusal(arguments, code, "moba: " + message + "\n");
  };
  const std::string help = " (see moba backward --help)";
  refuse({}, kWrongCommandLine, "IN is required" + help);
  refuse({in_, "--quiet"}, kWrongCommandLine, "--quiet requires --output" + help);
  refuse({in_, "--quiet", "-o", out_, "--check", "always"}, kRefused,
         "--check: is always; allowed with --quiet, which prints no errors: auto, never");
  refuse({in_, "--check", "maybe"}, kWrongCommandLine, "--check: is 'maybe'; allowed: auto, always, never" + help);
  refuse({in_, "--seed", "-1"}, kWrongCommandLine, "--seed: is '-1'; allowed: whole numbers from 0 to 2^63 - 1" + help);
  refuse({in_, "--repeat", "0"}, kWrongCommandLine, "--repeat: is '0'; allowed: whole numbers from 1 to 1000" + help);
  refuse({in_, "-o", in_}, kRefused, in_ + ": is the input file; the output must be another");
  refuse({in_, "-o", out_, "--seed", "5"}, kRefused, "--seed: is 5; allowed only where the file holds no dout");
  refuse({folder_.file("no"), "-o", folder_.file("no/out")}, kRefused,
         folder_.file("no/out") + ": the folder " + folder_.file("no") + " does not exist");
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
}

TEST_F(CliBackward, RefusesADoutThatDoesNotFit) {
  const auto refuse = [&](DType dtype, std::initializer_list<std::int64_t> shape, const std::string& is) {
    const Buffer memory(4096);
    std::memset(memory.data(), 0, memory.size());
    const ConstTensor q(memory.data(), DType::f32, {4, 2, 8}), kv(memory.data(), DType::f32, {4, 1, 8});
    write_safetensors(in_, {{"q", q}, {"k", kv}, {"v", kv}, {"dout", ConstTensor(memory.data(), dtype, shape)}});
    expect_refusal({"backward", in_, "-o", out_}, kRefused,
                   "moba: " + in_ + ": dout: is " + is + "; q's F32 [4, 2, 8] is wanted\n");
    EXPECT_EQ(folder_.names(), std::vector<std::string>{"in"});
  };
  refuse(DType::bf16, {4, 2, 8}, "BF16 [4, 2, 8]");
  refuse(DType::f32, {4, 1, 8}, "F32 [4, 1, 8]");
  refuse(DType::f32, {3, 2, 8}, "F32 [3, 2, 8]");
  refuse(DType::f32, {64}, "F32 [64]");
}

// What is held against float64 must be what was computed: a number that is off shows.
TEST_F(CliBackward, TheCheckFindsWhatIsOff) {
  input_.dout = true;
  input_.write(in_);
  const Expected expected(in_, small_blocks());
  const Plan plan(expected.file.problem(small_blocks()));
  Progress progress;
  const auto check = [&] {
    return check_gradients(plan, expected.file.inputs, expected.selection.ids, expected.outputs, expected.dout,
                           expected.gradients, progress);
  };
  EXPECT_LE(check().dk.max, 1e-5);
  EXPECT_EQ(check().dk.not_finite, 0);
  float& element = static_cast<float*>(expected.gradients.dk.data)[700];
  element += 1.0f;
  EXPECT_GE(check().dk.max, 0.01);
  EXPECT_LE(check().dq.max, 1e-5);
  element = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(check().dk.not_finite, 1);
}

}  // namespace
}  // namespace moba::cli
