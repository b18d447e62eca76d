// Rows of memory that will be needed soon, brought to L2 a few cache lines at a time while a product is computed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moba::cpu {

class NextRows {
 public:
  NextRows() = default;
  // `count` rows of `bytes` each.
  NextRows(const void* const* rows, std::int64_t count, std::int64_t bytes) : rows_(rows), count_(count), bytes_(bytes) {}

  // Spreads the lines evenly over so many calls of step(): asked for all at once, they would wait for each other, and the
  // arithmetic for them.
  void spread(std::int64_t steps) {
    const std::int64_t lines = count_ * ((bytes_ + kLine - 1) / kLine);
    per_step_ = steps > 0 ? (lines + steps - 1) / steps : 0;
  }

  void step() {
#if defined(__GNUC__)
    for (std::int64_t i = 0; i < per_step_ && count_ > 0; ++i) {
      __builtin_prefetch(static_cast<const std::byte*>(*rows_) + at_, 0, 2);
      at_ += kLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      ++rows_;
      --count_;
    }
#endif
  }

 private:
  static constexpr std::int64_t kLine = 64;

  const void* const* rows_ = nullptr;
  std::int64_t count_ = 0, bytes_ = 0, per_step_ = 0, at_ = 0;
};

}  // namespace moba::cpu
