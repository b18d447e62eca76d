#include "safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "moba/error.h"
#include "output_file.h"
#include "text.h"

namespace moba::cli {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian; no byte swapping is done here");

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the limit of the format's own implementation
constexpr std::size_t kAlignment = 8;                  // the header is padded so that the data begins aligned

const char* file_dtype(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "F32";
    case DType::f16:
      return "F16";
    case DType::bf16:
      return "BF16";
    case DType::i32:
      return "I32";
    case DType::i64:
      return "I64";
  }
  return "";
}

std::string header_text(const std::vector<NamedTensor>& tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::size_t at = 0;
  for (const NamedTensor& item : tensors) {
    const std::size_t end = at + bytes_of(item.tensor);
    auto& entry = header[item.name];
    entry["dtype"] = file_dtype(item.tensor.dtype);
    entry["shape"] = std::vector(item.tensor.shape.begin(), item.tensor.shape.begin() + item.tensor.rank);
    entry["data_offsets"] = {at, end};
    at = end;
  }
  // Text that is not UTF-8 (a file name in the metadata) is written with replacement characters.
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  return text;
}

}  // namespace

SafetensorsReader::SafetensorsReader(const std::string& path) : path_(path) {
  // Non-blocking: a named pipe is refused below instead of waited for. It means nothing for regular files.
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) throw Error(path + ": cannot open: " + std::strerror(errno));
  try {
    open_and_parse();
  } catch (const Error& error) {
    close(descriptor_);
    throw Error(path + ": " + error.what());
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

SafetensorsReader::~SafetensorsReader() { close(descriptor_); }

void SafetensorsReader::open_and_parse() {
  struct stat status {};
  if (fstat(descriptor_, &status) != 0) throw Error(std::string("cannot read: ") + std::strerror(errno));
  if (!S_ISREG(status.st_mode)) throw Error("is not a regular file");
  const auto file_bytes = static_cast<std::uint64_t>(status.st_size);
  std::uint64_t header_bytes = 0;
  if (file_bytes < sizeof(header_bytes)) throw Error("not a safetensors file: shorter than 8 bytes");
  read_at(0, &header_bytes, sizeof(header_bytes));
  if (header_bytes > kLongestHeader) {
    throw Error("not a safetensors file: its header would be " + std::to_string(header_bytes) +
                " bytes; at most 100000000 are allowed");
  }
  if (header_bytes > file_bytes - sizeof(header_bytes)) {
    throw Error("cut short: its header is " + std::to_string(header_bytes) + " bytes, the file " +
                std::to_string(file_bytes));
  }
  std::string json(header_bytes, '\0');
  read_at(sizeof(header_bytes), json.data(), json.size());
  data_begin_ = sizeof(header_bytes) + header_bytes;
  header_ = parse_safetensors_header(json, file_bytes - data_begin_);
}

const FileTensor* SafetensorsReader::find(std::string_view name) const {
  const auto found = std::find_if(header_.tensors.begin(), header_.tensors.end(),
                                  [&](const FileTensor& tensor) { return tensor.name == name; });
  return found == header_.tensors.end() ? nullptr : &*found;
}

Buffer SafetensorsReader::read(const FileTensor& tensor) const {
  Buffer buffer(tensor.end - tensor.begin);
  try {
    read_at(data_begin_ + tensor.begin, buffer.data(), buffer.size());
  } catch (const Error& error) {
    throw Error(path_ + ": tensor '" + printable(tensor.name) + "': " + error.what());
  }
  return buffer;
}

void SafetensorsReader::read_at(std::uint64_t offset, void* to, std::size_t bytes) const {
  char* at = static_cast<char*>(to);
  while (bytes > 0) {
    constexpr std::size_t kMost = std::size_t{1} << 30;  // one call of pread(2) gives less than 2 GiB
    const ssize_t got = pread(descriptor_, at, std::min(bytes, kMost), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(std::string("cannot read: ") + std::strerror(errno));
    if (got == 0) throw Error("the file became shorter while it was read");
    at += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
}

void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const std::string header = header_text(tensors, metadata);
  const std::uint64_t header_bytes = header.size();
  OutputFile file(path);
  file.write(&header_bytes, sizeof(header_bytes));
  file.write(header);
  for (const NamedTensor& item : tensors) file.write(item.tensor.data, bytes_of(item.tensor));
  file.commit();
}

}  // namespace moba::cli
