#include "views.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "numeric.h"

namespace moba::fuzz {

namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 20;   // bytes that a view may span here
constexpr std::int64_t kWrong = 64;                     // bytes behind a view that no function may believe
constexpr std::int64_t kLimit = std::int64_t{1} << 56;  // elements above which every view is refused

// Bytes from the first element to behind the last. Nothing where every function must refuse the view for what it is.
std::optional<__int128> span_of(const Tensor& t) {
  if (t.rank < 1 || t.rank > kMaxRank || static_cast<int>(t.dtype) > static_cast<int>(DType::i64)) return {};
  __int128 last = 0;
  for (int i = 0; i < t.rank; ++i) {
    const __int128 length = t.shape[i], stride = t.stride[i];
    if (length < 0) return {};
    if (length <= 1) continue;
    if (stride < 0 || length * stride > kLimit) return {};
    last += (length - 1) * stride;
  }
  if (std::find(t.shape.begin(), t.shape.begin() + t.rank, 0) != t.shape.begin() + t.rank) return 0;
  return (last + 1) * static_cast<int>(size_in_bytes(t.dtype));
}

}  // namespace

std::int64_t Bytes::odd_number() {
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
  const std::int64_t small = number(-2, 70);
  return pick<std::int64_t>({small, small, small, 0, -1, kLargest, -kLargest - 1, 0x7fffffff, 0x80000000, 0x100000000,
                             kLimit - 1, kLimit + 1, std::int64_t{1} << 61});
}

double Bytes::odd_real() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto whole = static_cast<double>(number(-4, 100));
  return pick({whole, whole, 0.0, -0.0, 0.5, 1e-320, 1e38, 3e38, 1e300, -1e300, kInfinity, -kInfinity,
               std::numeric_limits<double>::quiet_NaN()});
}

int Views::add(View view) {
  view.host = views_.size();
  views_.push_back(std::move(view));
  return static_cast<int>(views_.size()) - 1;
}

int Views::add(std::string_view name, DType dtype, std::initializer_list<std::int64_t> shape) {
  View view;
  view.name = name;
  view.tensor = Tensor(nullptr, dtype, shape);
  return add(std::move(view));
}

int Views::add_table(std::string_view name, std::vector<std::int32_t> entries,
                     std::initializer_list<std::int64_t> shape) {
  View view;
  view.name = name;
  view.tensor = Tensor(nullptr, DType::i32, shape);
  view.entries = std::move(entries);
  return add(std::move(view));
}

int Views::add_memory(std::string_view name, std::size_t size) {
  View view;
  view.name = name;
  view.is_memory = true;
  view.span = static_cast<std::int64_t>(size);
  return add(std::move(view));
}

Views::View& Views::any_view() { return views_[static_cast<std::size_t>(bytes_.number(0, std::ssize(views_) - 1))]; }

bool Views::is_host(std::size_t view) const {
  return std::ranges::any_of(views_, [&](const View& other) { return &other != &views_[view] && other.host == view; });
}

void Views::change(View& view) {
  const std::int64_t way = bytes_.number(0, 5);
  if (way == 0) {
    view.pointer = bytes_.pick({Pointer::null, Pointer::moved});
  } else if (way == 1) {
    const auto host = static_cast<std::size_t>(&any_view() - views_.data());
    if (views_[host].host == host && !is_host(view.host)) view.host = host;
  } else if (view.is_memory) {
    shorten(view);
  } else if (!view.entries.empty() && way < 4) {
    view.entries[static_cast<std::size_t>(bytes_.number(0, std::ssize(view.entries) - 1))] =
        static_cast<std::int32_t>(bytes_.odd_number());
  } else if (way < 4) {
    lay_out(view.tensor);
  } else {
    spoil(view.tensor);
  }
}

// Not where a cache line begins, and now and then too small.
void Views::shorten(View& memory) {
  memory.at = bytes_.number(0, 63);
  if (bytes_.one_in(2))
    memory.span = std::max<std::int64_t>(0, memory.span - bytes_.pick({1, 63, 64, 65, 1000, 1 << 20}));
}

// Rows apart from each other, dimensions in another order.
void Views::lay_out(Tensor& t) {
  if (span_of(t).value_or(kMost) >= kMost) return;  // spoilt already
  const std::int64_t gap = bytes_.number(0, 9);
  const bool swapped = bytes_.one_in(2) && t.rank >= 3;
  std::int64_t step = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    const int dim = swapped && i < 2 ? 1 - i : i;
    t.stride[dim] = step;
    step = step * std::max<std::int64_t>(t.shape[dim], 1) + (i == t.rank - 1 ? gap : 0);
  }
}

void Views::spoil(Tensor& t) {
  const auto dim = static_cast<std::size_t>(bytes_.number(0, kMaxRank - 1));
  switch (bytes_.number(0, 6)) {
    case 0:
      t = {};
      return;
    case 1:
      t.rank = static_cast<int>(bytes_.pick<std::int64_t>({1, 2, 3, 4, 5, 7, 1000, -1, -1000}));
      return;
    case 2:
      t.dtype = static_cast<DType>(bytes_.number(0, 7));
      return;
    case 3:
      t.shape[dim] = bytes_.odd_number();
      return;
    case 4:
      t.stride[dim] = bytes_.odd_number();
      return;
    case 5:
      t.device = static_cast<Device>(bytes_.number(0, 2));
      t.device_index = static_cast<int>(bytes_.number(-1, 1));
      return;
    default:
      t.shape[dim] += bytes_.pick({1, -1});
  }
}

bool Views::place() {
  for (std::int64_t changes = bytes_.pick({0, 1, 2, 3}); changes > 0; --changes) change(any_view());
  std::vector<std::int64_t> size;
  for (View& view : views_) {
    if (!view.is_memory) {
      const std::optional<__int128> span = span_of(view.tensor);
      if (span && *span > kMost) return false;
      view.span = span ? static_cast<std::int64_t>(*span) : kWrong;
    }
    size.push_back(view.at + view.span);
  }
  for (std::size_t i = 0; i < views_.size(); ++i) {
    View& view = views_[i];
    if (view.host == i) continue;
    view.at = bytes_.number(0, size[view.host] / 8) * 8;
    size[view.host] = std::max(size[view.host], view.at + view.span);
  }
  for (std::size_t i = 0; i < views_.size(); ++i) {
    if (views_[i].host != i) continue;
    views_[i].owned_size = size[i];
    views_[i].owned = std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(size[i]));
  }
  const bool wild = bytes_.one_in(4);
  auto seed = static_cast<std::uint32_t>(bytes_.number(0, 255));
  for (View& view : views_) {
    view.tensor.data = views_[view.host].owned.get() + view.at;
    fill(view, wild, seed += 1000);
    if (view.pointer == Pointer::null) view.tensor.data = nullptr;
    // No element of a tensor is one byte long, so a place one byte further is refused.
    const bool moved = view.pointer == Pointer::moved && !view.is_memory;
    if (moved) view.tensor.data = static_cast<std::byte*>(view.tensor.data) + 1;
  }
  return true;
}

// Tables hold their entries; floating types numbers of ordinary size or, in the wild, any bits at all.
void Views::fill(const View& view, bool wild, std::uint32_t seed) {
  auto* const bytes = static_cast<std::byte*>(view.tensor.data);
  if (view.is_memory) {
    std::memset(bytes, static_cast<int>(seed & 0xff), static_cast<std::size_t>(view.span));
    return;
  }
  if (!view.entries.empty()) {
    const std::size_t size = std::min<std::size_t>(view.entries.size() * 4, static_cast<std::size_t>(view.span));
    std::memcpy(bytes, view.entries.data(), size);
    return;
  }
  const auto next = [&] { return seed = seed * 1664525 + 1013904223; };
  const DType dtype = view.tensor.dtype;
  const bool numbers = dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
  if (numbers && !wild && view.at % 4 == 0) {
    const auto count = view.span / static_cast<std::int64_t>(size_in_bytes(dtype));
    for (std::int64_t i = 0; i < count; ++i) {
      store_float(bytes, dtype, i, static_cast<float>(next() >> 16) / 32768 - 1);
    }
    return;
  }
  for (std::int64_t i = 0; i < view.span; ++i) bytes[i] = static_cast<std::byte>(next() >> 24);
}

Workspace Views::memory(int view) const {
  const View& v = views_[static_cast<std::size_t>(view)];
  return {static_cast<std::byte*>(v.tensor.data), static_cast<std::size_t>(v.span)};
}

bool Views::named_by(std::string_view message) const {
  return std::ranges::any_of(views_, [&](const View& view) {
    return message.starts_with(view.name) && message.find_first_of(":.[", view.name.size()) == view.name.size();
  });
}

void Views::spoil_memory() {
  const View& view = any_view();
  const std::int64_t value = bytes_.odd_number(), size = bytes_.pick({4, 8});
  if (view.owned_size < size) return;
  std::memcpy(view.owned.get() + bytes_.number(0, view.owned_size / size - 1) * size, &value,
              static_cast<std::size_t>(size));
}

std::vector<std::byte> Views::snapshot() const {
  std::int64_t size = 0;
  for (const View& view : views_) size += view.owned_size;
  std::vector<std::byte> all;
  all.reserve(static_cast<std::size_t>(size));
  for (const View& view : views_) all.insert(all.end(), view.owned.get(), view.owned.get() + view.owned_size);
  return all;
}

}  // namespace moba::fuzz
