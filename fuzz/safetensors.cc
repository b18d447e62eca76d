// The reader of safetensors files: any bytes are refused in one line, or give tensors that are all of the file's data.
#include "safetensors.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <span>
#include <string>
#include <string_view>

#include "moba/error.h"

namespace {

using moba::cli::FileTensor;
using moba::cli::SafetensorsReader;

constexpr std::size_t kPrefix = 8;  // bytes of the header's length

void require(bool good, const std::string& what) {
  if (good) return;
  std::cerr << what << std::endl;
  std::abort();
}

// A file that is only in memory.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view bytes) : descriptor_(memfd_create("fuzz", MFD_CLOEXEC)) {
    require(write(descriptor_, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()), "no memory file");
  }
  ~MemoryFile() { close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

// Whether it was accepted.
bool read_file(std::string_view bytes) {
  const MemoryFile file(bytes);
  try {
    const SafetensorsReader reader(file.path());
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), kPrefix);
    const std::string_view data = bytes.substr(kPrefix + header_bytes);
    std::uint64_t total = 0;
    for (const FileTensor& tensor : reader.tensors()) {
      const moba::cli::Buffer buffer = reader.read(tensor);
      require(buffer.size() == tensor.end - tensor.begin && tensor.end <= data.size(), tensor.name + ": its size");
      require(std::memcmp(buffer.data(), data.data() + tensor.begin, buffer.size()) == 0, tensor.name + ": its data");
      require(reader.find(tensor.name) != nullptr, tensor.name + ": is not found");
      total += buffer.size();
    }
    require(total == data.size(), "data that belongs to no tensor");
    return true;
  } catch (const moba::Error& error) {
    const std::string_view message = error.what();
    require(message.starts_with(file.path() + ": "), "a message without the file: " + std::string(message));
    require(std::ranges::none_of(message, [](char letter) { return letter >= 0 && letter < ' '; }),
            "not one printable line: " + std::string(message));
    return false;
  }
}

// The same header, up to its last brace, with the length that it has.
std::string with_true_length(std::string_view bytes) {
  const std::string_view rest = bytes.substr(kPrefix);
  const std::uint64_t header_bytes = rest.rfind('}') + 1;
  std::string mended(kPrefix, '\0');
  std::memcpy(mended.data(), &header_bytes, kPrefix);
  return mended.append(rest);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  // Few changes to a header leave its length true, so the length is mended.
  if (!read_file(bytes) && size > kPrefix) read_file(with_true_length(bytes));
  return 0;
}
