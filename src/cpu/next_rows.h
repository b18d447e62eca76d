// Rows of memory that will be needed soon, brought to L2 a few cache lines at a time while a product is computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moba::cpu {

struct NextRow {
  const void* data;
  std::int64_t bytes;
};

class NextRows {
 public:
  NextRows() = default;
  explicit NextRows(std::span<const NextRow> rows) : rows_(rows) {}

  // Spreads the lines evenly over so many calls of step(): asked for all at once, they would wait for each other, and
  // the arithmetic for them.
  void spread(std::int64_t steps) {
    std::int64_t lines = 0;
    for (const NextRow& row : rows_) lines += (row.bytes + kLine - 1) / kLine;
    per_step_ = steps > 0 ? (lines + steps - 1) / steps : 0;
  }

  void step() {
#if defined(__GNUC__)
    for (std::int64_t i = 0; i < per_step_ && !rows_.empty(); ++i) {
      __builtin_prefetch(static_cast<const std::byte*>(rows_.front().data) + at_, 0, 2);
      at_ += kLine;
      if (at_ < rows_.front().bytes) continue;
      at_ = 0;
      rows_ = rows_.subspan(1);
    }
#endif
  }

 private:
  static constexpr std::int64_t kLine = 64;

  std::span<const NextRow> rows_;
  std::int64_t per_step_ = 0, at_ = 0;
};

}  // namespace moba::cpu
