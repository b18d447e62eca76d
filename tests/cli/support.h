// What the tests of the program share: a folder of their own, files with any bytes, small inputs, and running the
// program.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "safetensors.h"

namespace moba::cli {

// An empty folder that goes with the object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  std::vector<std::string> names() const;  // of what is in it, sorted

 private:
  std::string path_;
};

void write_bytes(const std::string& path, std::string_view bytes);
std::string read_bytes(const std::string& path);

// The bytes of a safetensors file: the length of the header, the header, the data.
std::string safetensors_bytes(std::string_view header, std::string_view data);

struct Finished {
  int code = -1;
  std::string out, err;
};

// Runs the program with these arguments, in this process's folder. `limits` are shell commands that come first.
Finished run_moba(const std::vector<std::string>& arguments, const std::string& limits = "");

// The same of `arguments` and `options`, with small blocks that are chosen among unless the options say something else.
Finished run_choosing(std::vector<std::string> arguments, const std::vector<std::string>& options);

constexpr int kRefused = 1, kWrongCommandLine = 2;

// The program refuses these arguments: this exit code, and one line on standard error that holds `part`.
void expect_refusal(const std::vector<std::string>& arguments, int code, const std::string& part,
                    const std::string& limits = "");

// q, k and v of a small problem, from a hash of their indices.
struct SmallInput {
  std::int64_t tq = 64, tk = 64, q_heads = 4, kv_heads = 2, d = 16;
  DType dtype = DType::f32;
  std::map<std::string, std::vector<std::int32_t>> offsets;  // cu_seqlens tensors by name
  bool dout = false;                                         // one more tensor, of q's shape

  void write(const std::string& path) const;
};

// The largest |a - b| / |b| over rows of d; infinite where a value is not finite.
double largest_row_error(const std::vector<float>& a, const std::vector<float>& b, std::size_t d);

// The errors that moba backward printed are those that docs/spec.md section 11 allows.
void expect_gradient_errors(const Finished& run, DType dtype);

// The floats of a tensor of a file, widened.
std::vector<float> read_floats(const SafetensorsReader& file, const std::string& name);
std::vector<std::int32_t> read_ints(const SafetensorsReader& file, const std::string& name);

}  // namespace moba::cli
