#include "support.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <utility>

#include "moba/error.h"
#include "numeric.h"

namespace moba::cli {
namespace {

std::string quoted(const std::string& argument) {
  std::string text = "'";
  for (const char c : argument) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

// A value in [-2, 2) that has nothing to do with its neighbours.
float hashed(std::uint32_t i) {
  i = (i ^ (i >> 16)) * 0x85ebca6bu;
  i = (i ^ (i >> 13)) * 0xc2b2ae35u;
  i ^= i >> 16;
  return static_cast<float>(i >> 8) / 4194304.0f - 2.0f;
}

}  // namespace

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "moba-test-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw Error("cannot make a folder: " + pattern);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code fault;
  std::filesystem::remove_all(path_, fault);
}

std::vector<std::string> TemporaryFolder::names() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path_))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw Error("cannot write " + path);
}

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

std::string safetensors_bytes(std::string_view header, std::string_view data) {
  const std::uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes.append(header).append(data);
}

Finished run_moba(const std::vector<std::string>& arguments, const std::string& limits) {
  const TemporaryFolder folder;
  std::string command = limits + (limits.empty() ? "" : "; ") + quoted(MOBA_CLI_PATH);
  for (const std::string& argument : arguments) command += " " + quoted(argument);
  command += " </dev/null >" + quoted(folder.file("out")) + " 2>" + quoted(folder.file("err"));
  const int status = std::system(command.c_str());
  Finished run;
  run.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  run.out = read_bytes(folder.file("out"));
  run.err = read_bytes(folder.file("err"));
  return run;
}

Finished run_choosing(std::vector<std::string> arguments, const std::vector<std::string>& options) {
  for (const auto& [name, value] : {std::pair{"--block-size", "8"}, std::pair{"--top-k", "3"}}) {
    if (std::find(options.begin(), options.end(), name) == options.end()) {
      arguments.insert(arguments.end(), {name, value});
    }
  }
  arguments.insert(arguments.end(), options.begin(), options.end());
  return run_moba(arguments);
}

void expect_refusal(const std::vector<std::string>& arguments, int code, const std::string& part,
                    const std::string& limits) {
  std::string line = limits + " moba";
  for (const std::string& argument : arguments) line += " " + argument;
  SCOPED_TRACE(line);
  const Finished run = run_moba(arguments, limits);
  EXPECT_EQ(run.code, code);
  EXPECT_EQ(std::count(run.err.begin(), run.err.end(), '\n'), 1) << run.err;
  EXPECT_EQ(run.err.rfind("moba: ", 0), 0u) << run.err;
  EXPECT_NE(run.err.find(part), std::string::npos) << run.err;
}

void SmallInput::write(const std::string& path) const {
  std::vector<Buffer> memory;
  std::vector<NamedTensor> tensors;
  const auto add = [&](const char* name, std::int64_t tokens, std::int64_t heads, std::uint32_t seed) {
    const std::int64_t count = tokens * heads * d;
    const Buffer& values = memory.emplace_back(static_cast<std::size_t>(count) * size_in_bytes(dtype));
    for (std::int64_t i = 0; i < count; ++i) {
      store_float(values.data(), dtype, i, hashed(seed * 1000003u + static_cast<std::uint32_t>(i)));
    }
    tensors.push_back({name, ConstTensor(values.data(), dtype, {tokens, heads, d})});
  };
  add("q", tq, q_heads, 1);
  add("k", tk, kv_heads, 2);
  add("v", tk, kv_heads, 3);
  if (dout) add("dout", tq, q_heads, 4);
  for (const auto& [name, values] : offsets) {
    tensors.push_back({name, ConstTensor(values.data(), DType::i32, {static_cast<std::int64_t>(values.size())})});
  }
  write_safetensors(path, tensors);
}

double largest_row_error(const std::vector<float>& a, const std::vector<float>& b, std::size_t d) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t row = 0; row < b.size() && a.size() == b.size(); row += d) {
    double gap = 0, size = 0;
    for (std::size_t i = row; i < row + d; ++i) {
      gap += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
      size += std::pow(static_cast<double>(b[i]), 2);
    }
    if (!std::isfinite(gap)) return std::numeric_limits<double>::infinity();
    if (gap > 0) largest = std::max(largest, std::sqrt(gap / size));
  }
  return largest;
}

std::vector<float> read_floats(const SafetensorsReader& file, const std::string& name) {
  const FileTensor* tensor = file.find(name);
  if (tensor == nullptr) throw Error(file.path() + " has no tensor " + name);
  const Buffer bytes = file.read(*tensor);
  const DType dtype = tensor->dtype == "F32" ? DType::f32 : (tensor->dtype == "F16" ? DType::f16 : DType::bf16);
  std::vector<float> values(bytes.size() / size_in_bytes(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = load_float(bytes.data(), dtype, static_cast<std::int64_t>(i));
  }
  return values;
}

void expect_gradient_errors(const Finished& run, DType dtype) {
  const double bound = dtype == DType::f32 ? 1e-5 : (dtype == DType::f16 ? 4e-3 : 2e-2);
  for (const char* gradient : {"\ndq ", "\ndk ", "\ndv "}) {
    const std::size_t at = run.out.find(gradient);
    ASSERT_NE(at, std::string::npos) << run.out;
    std::istringstream line(run.out.substr(at));
    std::string name;
    double norm = 0, max = 0, median = 0;
    ASSERT_TRUE(line >> name >> norm >> max >> median) << run.out;
    EXPECT_GT(norm, 0.1) << run.out;
    EXPECT_LE(max, bound) << name << "\n" << run.out;
    EXPECT_LE(median, max) << run.out;
    EXPECT_GT(max, 0) << "float64 is not what was checked\n" << run.out;
  }
}

std::vector<std::int32_t> read_ints(const SafetensorsReader& file, const std::string& name) {
  const FileTensor* tensor = file.find(name);
  if (tensor == nullptr || tensor->dtype != "I32") throw Error(file.path() + " has no I32 tensor " + name);
  const Buffer bytes = file.read(*tensor);
  const auto* begin = bytes.as<std::int32_t>();
  return {begin, begin + bytes.size() / sizeof(std::int32_t)};
}

}  // namespace moba::cli
