// The header of a safetensors file: what tensors there are and where their bytes lie. Text in, checked facts out; no
// file is touched here. The format: https://github.com/huggingface/safetensors (README, "Format").
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace moba::cli {

// One tensor as the header states it.
struct FileTensor {
  std::string name;
  std::string dtype;  // as written: "F32", "BF16", "I32", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // its bytes, counted from the end of the header
};

struct SafetensorsHeader {
  std::vector<FileTensor> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

// Parses the JSON of a header whose file holds `data_bytes` bytes after it. Refuses (moba::Error, one line) whatever
// the format does not allow: other JSON, duplicate or unknown keys, unknown dtypes, shapes that overflow or do not fit
// the bytes, and data that overlaps, has holes or does not end where the file ends.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_bytes);

// "bf16 [4096, 9, 64]"-like text of a tensor of a file, for messages.
std::string describe(const FileTensor& tensor);

}  // namespace moba::cli
