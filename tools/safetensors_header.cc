#include "safetensors_header.h"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "moba/error.h"
#include "text.h"

namespace moba::cli {
namespace {

using nlohmann::json;

// Reads the events of a JSON parser; the grammar of a header has four levels and no recursion, so nesting, however
// deep, costs no stack: the first bracket that is out of place ends the parse.
class HeaderReader final : public nlohmann::json_sax<json> {
 public:
  SafetensorsHeader header;
  std::string fault;

  bool null() override { return misplaced("null"); }
  bool boolean(bool) override { return misplaced("true or false"); }
  bool binary(json::binary_t&) override { return misplaced("binary data"); }
  bool number_float(double, const std::string& text) override { return misplaced("the number " + printable(text)); }
  bool number_integer(std::int64_t value) override { return misplaced("the number " + std::to_string(value)); }

  bool number_unsigned(std::uint64_t value) override {
    if (place_ == Place::shape && value <= std::uint64_t{std::numeric_limits<std::int64_t>::max()}) {
      tensor().shape.push_back(static_cast<std::int64_t>(value));
    } else if (place_ == Place::offsets) {
      offsets_.push_back(value);
    } else {
      return misplaced("the number " + std::to_string(value));
    }
    return true;
  }

  bool string(std::string& text) override {
    if (place_ == Place::metadata) {
      if (!header.metadata.emplace(key_, text).second) return fail("__metadata__: key '" + printable(key_) + "' twice");
    } else if (place_ == Place::tensor && key_ == "dtype") {
      tensor().dtype = text;
    } else {
      return misplaced("the text '" + printable(text) + "'");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::top;
    } else if (place_ == Place::top && key_ == "__metadata__") {
      place_ = Place::metadata;
    } else if (place_ == Place::top) {
      place_ = Place::tensor;
      header.tensors.emplace_back().name = key_;
      fields_.clear();
    } else {
      return misplaced("an object");
    }
    return true;
  }

  bool key(std::string& text) override {
    if (place_ == Place::top && !names_.insert(text).second)
      return fail("tensor '" + printable(text) + "': is there twice");
    if (place_ == Place::tensor) {
      if (text != "dtype" && text != "shape" && text != "data_offsets") {
        return fail(about() + "unknown field '" + printable(text) + "'; allowed: dtype, shape, data_offsets");
      }
      if (!fields_.insert(text).second) return fail(about() + "field " + text + " is there twice");
    }
    key_ = std::move(text);
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (fields_.count(field) == 0) return fail(about() + "has no " + field);
      }
    }
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::tensor && key_ == "shape") {
      place_ = Place::shape;
    } else if (place_ == Place::tensor && key_ == "data_offsets") {
      place_ = Place::offsets;
      offsets_.clear();
    } else {
      return misplaced("an array");
    }
    return true;
  }

  bool end_array() override {
    if (place_ == Place::offsets) {
      if (offsets_.size() != 2) {
        return fail(about() + format("data_offsets has %zu entries; 2 are wanted", offsets_.size()));
      }
      tensor().begin = offsets_[0];
      tensor().end = offsets_[1];
    }
    place_ = Place::tensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail(format("the header is not valid JSON at its byte %zu", position));
  }

 private:
  enum class Place { outside, top, metadata, tensor, shape, offsets };

  FileTensor& tensor() { return header.tensors.back(); }
  std::string about() { return "tensor '" + printable(tensor().name) + "': "; }

  bool fail(std::string message) {
    fault = std::move(message);
    return false;
  }

  bool misplaced(const std::string& what) {
    switch (place_) {
      case Place::outside:
        return fail("the header is " + what + "; an object is wanted");
      case Place::top:
        return fail("tensor '" + printable(key_) + "': is " + what + "; an object is wanted");
      case Place::metadata:
        return fail("__metadata__: '" + printable(key_) + "' is " + what + "; text is wanted");
      case Place::tensor:
        return fail(about() + key_ + " is " + what + (key_ == "dtype" ? "; text is wanted" : "; an array is wanted"));
      case Place::shape:
        return fail(about() + "shape holds " + what + "; whole numbers from 0 to 2^63 - 1 are wanted");
      case Place::offsets:
        return fail(about() + "data_offsets holds " + what + "; whole numbers >= 0 are wanted");
    }
    return false;
  }

  Place place_ = Place::outside;
  std::string key_;               // the last key read
  std::set<std::string> names_;   // of the tensors
  std::set<std::string> fields_;  // of the current tensor
  std::vector<std::uint64_t> offsets_;
};

// Bits per element of every dtype of the format; 0: no such dtype.
std::uint64_t dtype_bits(std::string_view dtype) {
  struct Row {
    std::string_view dtype;
    std::uint64_t bits;
  };
  static constexpr std::array kRows{Row{"F32", 32},    Row{"F16", 16},    Row{"BF16", 16},   Row{"I32", 32},
                                    Row{"I64", 64},    Row{"F64", 64},    Row{"C64", 64},    Row{"U64", 64},
                                    Row{"U32", 32},    Row{"I16", 16},    Row{"U16", 16},    Row{"I8", 8},
                                    Row{"U8", 8},      Row{"BOOL", 8},    Row{"F8_E5M2", 8}, Row{"F8_E4M3", 8},
                                    Row{"F8_E8M0", 8}, Row{"F6_E2M3", 6}, Row{"F6_E3M2", 6}, Row{"F4", 4}};
  const auto* row = std::find_if(kRows.begin(), kRows.end(), [&](const Row& r) { return r.dtype == dtype; });
  return row == kRows.end() ? 0 : row->bits;
}

void check_size(const FileTensor& tensor) {
  const std::string about = "tensor '" + printable(tensor.name) + "': ";
  const std::uint64_t bits_each = dtype_bits(tensor.dtype);
  if (bits_each == 0) throw Error(about + "dtype '" + printable(tensor.dtype) + "' is unknown");
  std::uint64_t bits = bits_each;
  for (const std::int64_t extent : tensor.shape) {
    const auto factor = static_cast<std::uint64_t>(extent);
    if (factor != 0 && bits > std::numeric_limits<std::uint64_t>::max() / factor) {
      throw Error(about + "its shape makes more elements than can be counted");
    }
    bits *= factor;
  }
  if (tensor.begin > tensor.end) {
    throw Error(about + "data_offsets " + std::to_string(tensor.begin) + " to " + std::to_string(tensor.end) +
                " end before they begin");
  }
  if (bits % 8 != 0 || bits / 8 != tensor.end - tensor.begin) {
    throw Error(about + describe(tensor) + " takes " + std::to_string(bits / 8) + " bytes, but its data_offsets span " +
                std::to_string(tensor.end - tensor.begin));
  }
}

// Every byte of the data belongs to exactly one tensor. `tensors` are in the order of their data.
void check_layout(const std::vector<FileTensor>& tensors, std::uint64_t data_bytes) {
  std::uint64_t at = 0;
  for (const FileTensor& tensor : tensors) {
    const std::string about = "tensor '" + printable(tensor.name) + "': ";
    if (tensor.end > data_bytes) {
      throw Error(about + "its data ends at byte " + std::to_string(tensor.end) + ", but the file holds " +
                  std::to_string(data_bytes) + " bytes of data");
    }
    if (tensor.begin != at) {
      throw Error(about + "its data begins at byte " + std::to_string(tensor.begin) +
                  "; the tensor before it ends at " + std::to_string(at) +
                  (tensor.begin < at ? ": they overlap" : ": a hole"));
    }
    at = tensor.end;
  }
  if (at != data_bytes) {
    throw Error("the tensors end at byte " + std::to_string(at) + ", but the file holds " + std::to_string(data_bytes) +
                " bytes of data");
  }
}

}  // namespace

std::string describe(const FileTensor& tensor) {
  std::string text = tensor.dtype + " [";
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    if (i == 8) return text + ", ...]";
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]);
  }
  return text + "]";
}

SafetensorsHeader parse_safetensors_header(std::string_view json_text, std::uint64_t data_bytes) {
  if (json_text.empty() || json_text.front() != '{')
    throw Error("not a safetensors file: its header does not begin with {");
  // The JSON parser takes a zero byte for the end of its input; what follows would go unseen.
  if (json_text.find('\0') != json_text.npos) throw Error("the header is not valid JSON: it holds a zero byte");
  HeaderReader reader;
  if (!json::sax_parse(json_text.begin(), json_text.end(), &reader)) throw Error(reader.fault);
  SafetensorsHeader header = std::move(reader.header);
  for (const FileTensor& tensor : header.tensors) check_size(tensor);
  std::sort(header.tensors.begin(), header.tensors.end(), [](const FileTensor& a, const FileTensor& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_layout(header.tensors, data_bytes);
  return header;
}

}  // namespace moba::cli
