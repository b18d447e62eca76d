// How a refusal is worded: "ARGUMENT: is WAS; allowed: ALLOWED".
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>

#include "moba/error.h"

namespace moba {

template <class T>
[[noreturn]] void refuse(std::string_view argument, const T& was, std::string_view allowed) {
  std::string text(argument);
  if constexpr (std::is_floating_point_v<T>) {
    std::array<char, 32> digits;
    std::snprintf(digits.data(), digits.size(), "%g", was);
    text += std::string(": is ") + digits.data();
  } else if constexpr (std::is_integral_v<T>) {
    text += ": is " + std::to_string(was);
  } else {
    text += ": is ";
    const auto ends_line = [](char letter) { return static_cast<unsigned char>(letter) < ' '; };
    for (const char letter : std::string_view(was)) text += ends_line(letter) ? '?' : letter;
  }
  throw Error(text + "; allowed: " + std::string(allowed));
}

inline void check_range(std::string_view argument, std::int64_t was, std::int64_t least,
                        std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
  if (was >= least && was <= most) return;
  refuse(argument, was,
         most == std::numeric_limits<std::int64_t>::max() ? std::to_string(least) + " or more"
                                                          : std::to_string(least) + " to " + std::to_string(most));
}

inline void check_positive(std::string_view argument, double was) {
  if (!(was > 0) || !std::isfinite(was)) refuse(argument, was, "finite numbers above 0");
}

// The product of the factors, or a refusal of `what` where it does not fit.
inline std::int64_t checked_product(std::string_view what, std::initializer_list<std::int64_t> factors) {
  std::int64_t product = 1;
  for (const std::int64_t factor : factors) {
    // 2^56: bytes of any dtype, and sums of several such sizes, still fit in 64 bits.
    if (__builtin_mul_overflow(product, factor, &product) || product > (std::int64_t{1} << 56)) {
      refuse(what, "more than 2^56", "sizes that fit in memory");
    }
  }
  return product;
}

}  // namespace moba
