#include "text.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <limits>
#include <system_error>

#include "moba/error.h"

namespace moba::cli {
namespace {

// `value` scaled down by `step` until it is below it, with the unit that this makes.
template <std::size_t N>
std::string scaled(double value, double step, const std::array<const char*, N>& units) {
  std::size_t unit = 0;
  while (value >= step && unit + 1 < N) {
    value /= step;
    ++unit;
  }
  const int digits = unit == 0 ? 0 : (value < 10 ? 2 : 1);
  return format("%.*f %s", digits, value, units[unit]);
}

// from_chars knows no leading plus sign; people do.
std::string_view without_plus(std::string_view text) {
  if (text.size() > 1 && text[0] == '+' && text[1] != '-') text.remove_prefix(1);
  return text;
}

}  // namespace

std::string format(const char* pattern, ...) {
  std::va_list arguments, again;
  va_start(arguments, pattern);
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, pattern, arguments);
  va_end(arguments);
  std::string text(length > 0 ? static_cast<std::size_t>(length) : 0, '\0');
  std::vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  return text;
}

std::string format_bytes(double bytes) {
  return scaled(bytes, 1024.0, std::array{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"});
}

std::string format_seconds(double seconds) {
  if (seconds < 1e-3) return format("%.1f us", seconds * 1e6);
  if (seconds < 1.0) return format("%.2f ms", seconds * 1e3);
  return format("%.2f s", seconds);
}

std::string format_flop(double flop) {
  return scaled(flop, 1000.0, std::array{"FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"});
}

std::int64_t parse_int(std::string_view what, std::string_view text, std::int64_t low, std::int64_t high) {
  const std::string_view digits = without_plus(text);
  std::int64_t value = 0;
  const auto [end, fault] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (fault == std::errc{} && end == digits.data() + digits.size() && value >= low && value <= high) return value;
  const bool open = high == std::numeric_limits<std::int64_t>::max();
  throw Error(std::string(what) + ": is '" + printable(text) + "'; allowed: whole numbers from " + std::to_string(low) +
              " to " + (open ? "2^63 - 1" : std::to_string(high)));
}

std::int64_t parse_bytes(std::string_view what, std::string_view text) {
  constexpr std::string_view kUnits = "KMGT";
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::string_view digits = text;
  if (digits.ends_with("iB")) digits.remove_suffix(2);
  const bool long_unit = digits.size() != text.size();
  const std::size_t unit = digits.empty() ? kUnits.npos : kUnits.find(digits.back());
  if (unit != kUnits.npos) digits.remove_suffix(1);
  const int shift = unit == kUnits.npos ? 0 : 10 * static_cast<int>(unit + 1);
  std::int64_t value = 0;
  const auto [end, fault] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  const bool whole = fault == std::errc{} && end == digits.data() + digits.size();
  if (whole && value >= 1 && value <= (kMost >> shift) && !(long_unit && shift == 0)) return value << shift;
  throw Error(std::string(what) + ": is '" + printable(text) +
              "'; allowed: whole numbers of bytes from 1 on, or of KiB, MiB, GiB, TiB, such as 512M or 2GiB");
}

double parse_real(std::string_view what, std::string_view text) {
  const std::string_view digits = without_plus(text);
  double value = 0;
  const auto [end, fault] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (fault == std::errc{} && end == digits.data() + digits.size() && std::isfinite(value)) return value;
  throw Error(std::string(what) + ": is '" + printable(text) + "'; allowed: finite real numbers");
}

std::string printable(std::string_view text, std::size_t longest) {
  std::string result;
  for (const char c : text) {
    if (result.size() >= longest) return result + "...";
    const auto byte = static_cast<unsigned char>(c);
    result += byte < 0x20 || byte == 0x7f ? format("\\x%02x", byte) : std::string(1, c);
  }
  return result;
}

}  // namespace moba::cli
