// A file that appears whole or not at all: written under a temporary name in the same folder, then renamed.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moba::cli {

// Refuses (moba::Error) a path that OutputFile could not write, so that a mistake shows before the work, not after it.
// `input` is a file that was read for it, which the output must not replace.
void check_output(const std::string& path, const std::string& input = "");

class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  ~OutputFile();  // without commit: removes the temporary file; `path` is as it was
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const void* data, std::size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void commit();  // syncs, then takes the place of `path`

 private:
  [[noreturn]] void fail(const char* action);

  std::string shown_;      // as the user wrote it
  std::string path_;       // with links followed
  std::string temporary_;  // empty: nothing to remove
  int descriptor_ = -1;
};

}  // namespace moba::cli
