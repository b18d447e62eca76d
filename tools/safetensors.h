// Reads and writes safetensors files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "buffer.h"
#include "moba/tensor.h"
#include "safetensors_header.h"

namespace moba::cli {

// An open file whose header has been checked as a whole. Every fault is a moba::Error of one line that names the file.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path);
  ~SafetensorsReader();
  SafetensorsReader(const SafetensorsReader&) = delete;
  SafetensorsReader& operator=(const SafetensorsReader&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<FileTensor>& tensors() const { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const FileTensor* find(std::string_view name) const;  // null: not there

  // The bytes of one of tensors(), copied: in the file they may lie at any address.
  Buffer read(const FileTensor& tensor) const;

 private:
  void open_and_parse();
  void read_at(std::uint64_t offset, void* to, std::size_t bytes) const;

  std::string path_;
  int descriptor_ = -1;
  std::uint64_t data_begin_ = 0;
  SafetensorsHeader header_;
};

// A tensor to write: contiguous, on the CPU.
struct NamedTensor {
  std::string name;
  ConstTensor tensor;
};

// Writes the tensors in the order given, through a temporary file: on any fault (moba::Error) `path` is as it was.
void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace moba::cli
