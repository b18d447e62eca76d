// Numbers to text and text to numbers, for people.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace moba::cli {

// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

std::string format_bytes(double bytes);      // "256.0 MiB"
std::string format_seconds(double seconds);  // "12.34 ms"
std::string format_flop(double flop);        // "3.21 GFLOP"

// The whole of `text` as a decimal number in [low, high]; anything else is a moba::Error that starts with `what`.
std::int64_t parse_int(std::string_view what, std::string_view text, std::int64_t low, std::int64_t high);
// The same for a number of bytes from 1 to 2^63 - 1: "1000000", "512M" and "512MiB" (2^20 bytes each), likewise K, G
// and T.
std::int64_t parse_bytes(std::string_view what, std::string_view text);
// The same for a finite real number.
double parse_real(std::string_view what, std::string_view text);

// `text` fit for a one-line message: control characters escaped, cut short when long.
std::string printable(std::string_view text, std::size_t longest = 80);

}  // namespace moba::cli
