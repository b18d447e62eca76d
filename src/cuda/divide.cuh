// Divisions: by a number that only the host knows, and rounded up.
#pragma once

#include <bit>
#include <cstdint>

namespace moba::cuda {

// n / divisor for 0 <= n < 2^31 by one multiplication.
class Divide {
 public:
  explicit Divide(int divisor)
      : shift_(std::bit_width(static_cast<std::uint32_t>(divisor - 1))),
        magic_(static_cast<std::uint32_t>((std::uint64_t{1} << (31 + shift_)) / static_cast<std::uint64_t>(divisor) +
                                          1)) {}
  __device__ __forceinline__ int operator()(int n) const {
    return static_cast<int>(__umulhi(2 * static_cast<std::uint32_t>(n), magic_) >> shift_);
  }

 private:
  int shift_;
  std::uint32_t magic_;
};

// n / by, rounded up, for n >= 0.
constexpr int divide_up(int n, int by) { return n / by + (n % by != 0 ? 1 : 0); }

}  // namespace moba::cuda
