// Views of tensors as a stranger may hand them over: most as they should be, a few spoilt; each with exactly the memory
// that it speaks of, so that the address sanitizer sees every access to more.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moba/moba.h"

namespace moba::fuzz {

// The input of a fuzzer as a stream of decisions. Behind its end nothing is spoilt.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : provider_(data, size) {}

  // From `least` to `most`, both included; `least` behind the end.
  std::int64_t number(std::int64_t least, std::int64_t most) { return provider_.ConsumeIntegralInRange(least, most); }
  bool one_in(std::int64_t n) { return number(0, n - 1) == 1; }
  // The first behind the end.
  template <class T>
  T pick(std::initializer_list<T> all) {
    return all.begin()[number(0, static_cast<std::int64_t>(all.size()) - 1)];
  }
  // What a check may not have thought of.
  std::int64_t odd_number();
  double odd_real();

 private:
  FuzzedDataProvider provider_;
};

class Views {
 public:
  explicit Views(Bytes& bytes) : bytes_(bytes) {}

  // Each adds a view and returns its number.
  int add(std::string_view name, DType dtype, std::initializer_list<std::int64_t> shape);
  int add_table(std::string_view name, std::vector<std::int32_t> entries, std::initializer_list<std::int64_t> shape);
  int add_table(std::string_view name, const std::vector<std::int32_t>& entries) {
    return add_table(name, entries, {std::int64_t(entries.size())});
  }
  int add_memory(std::string_view name, std::size_t size);  // a workspace

  // Spoils a few views, gives all their memory and fills it. False where a view that is valid by itself spans more than
  // a fuzzer has.
  bool place();

  const Tensor& operator[](int view) const { return views_[static_cast<std::size_t>(view)].tensor; }
  Workspace memory(int view) const;
  bool named_by(std::string_view message) const;  // one of the views

  // Writes an odd number somewhere.
  void spoil_memory();
  // The bytes of all memory, to see what a call has changed.
  std::vector<std::byte> snapshot() const;

 private:
  enum class Pointer { good, null, moved };

  struct View {
    std::string name;
    Tensor tensor;
    std::vector<std::int32_t> entries;  // of a table
    bool is_memory = false;
    std::size_t host = 0;   // the view whose memory it lies in: most have their own
    std::int64_t at = 0;    // there
    std::int64_t span = 0;  // bytes from the first element to behind the last
    Pointer pointer = Pointer::good;
    std::unique_ptr<std::byte[]> owned;
    std::int64_t owned_size = 0;
  };

  int add(View view);
  View& any_view();
  void change(View& view);  // in one way or another
  void spoil(Tensor& tensor);
  void lay_out(Tensor& tensor);
  void shorten(View& memory);
  bool is_host(std::size_t view) const;  // of others
  void fill(const View& view, bool wild, std::uint32_t seed);

  Bytes& bytes_;
  std::vector<View> views_;
};

}  // namespace moba::fuzz
