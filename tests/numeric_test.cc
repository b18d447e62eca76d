// The 16-bit formats: every pattern widened, every rounding boundary narrowed, in numeric.h and in the vector code of
// every target of the cpu.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "support.h"

namespace moba::test {
namespace {

struct Format {
  DType dtype;
  int fraction_bits;
  int bias;

  std::uint16_t infinity() const { return static_cast<std::uint16_t>(0x7fff >> fraction_bits << fraction_bits); }
  float widen(std::uint32_t bits) const {
    return dtype == DType::f16 ? f16_to_float(static_cast<std::uint16_t>(bits))
                               : bf16_to_float(static_cast<std::uint16_t>(bits));
  }
  std::uint16_t narrow(float value) const { return dtype == DType::f16 ? float_to_f16(value) : float_to_bf16(value); }

  // What the bits mean, from the definition of the format.
  double meaning(std::uint32_t bits) const {
    const int exponent = static_cast<int>((bits & 0x7fff) >> fraction_bits);
    const int fraction = static_cast<int>(bits & ((1u << fraction_bits) - 1));
    const int whole = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
    const double magnitude = std::ldexp(whole, std::max(exponent, 1) - bias - fraction_bits);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
};
constexpr Format kFormats[] = {{DType::f16, 10, 15}, {DType::bf16, 7, 127}};

bool is_nan(const Format& f, std::uint16_t bits) { return (bits & 0x7fff) > f.infinity(); }

// A float and the 16 bits that it must be rounded to.
struct Rounding {
  float from;
  std::uint16_t to;
};

// Every finite number of the format, and between any two neighbours the middle (a tie, so to the even one) and the
// floats next to it; the same between the largest number and infinity.
std::vector<Rounding> roundings(const Format& f) {
  std::vector<Rounding> all;
  const auto add = [&](float from, std::uint32_t to) {
    all.push_back({from, static_cast<std::uint16_t>(to)});
    all.push_back({-from, static_cast<std::uint16_t>(to | 0x8000)});
  };
  for (std::uint32_t low = 0; low < f.infinity(); ++low) {
    const double next = f.meaning(low + 1), middle = (f.meaning(low) + next) / 2;
    add(static_cast<float>(f.meaning(low)), low);
    const float tie = static_cast<float>(middle);  // exact, also below the smallest and above the largest number
    add(tie, low % 2 == 0 ? low : low + 1);
    add(std::nextafter(tie, 0.0f), low);
    add(std::nextafter(tie, std::numeric_limits<float>::infinity()), low + 1);
  }
  return all;
}

TEST(Numeric, WidensEveryPattern) {
  for (const Format& f : kFormats) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float wide = f.widen(bits);
      if (is_nan(f, static_cast<std::uint16_t>(bits))) {
        ASSERT_TRUE(std::isnan(wide)) << name(f.dtype) << " " << bits;
      } else if ((bits & 0x7fff) == f.infinity()) {
        ASSERT_EQ(wide, bits & 0x8000 ? -INFINITY : INFINITY);
      } else {
        ASSERT_EQ(wide, f.meaning(bits)) << name(f.dtype) << " " << bits;
      }
      ASSERT_EQ(std::signbit(wide), (bits & 0x8000) != 0) << name(f.dtype) << " " << bits;
    }
  }
}

TEST(Numeric, NarrowsEveryBoundary) {
  for (const Format& f : kFormats) {
    for (const Rounding& r : roundings(f)) ASSERT_EQ(f.narrow(r.from), r.to) << name(f.dtype) << " from " << r.from;
    EXPECT_EQ(f.narrow(INFINITY), f.infinity());
    EXPECT_EQ(f.narrow(-INFINITY), f.infinity() | 0x8000);
    EXPECT_EQ(f.narrow(std::numeric_limits<float>::max()), f.infinity());
    EXPECT_EQ(f.narrow(std::numeric_limits<float>::denorm_min()), 0);
    EXPECT_EQ(f.narrow(-std::numeric_limits<float>::denorm_min()), 0x8000);
  }
}

TEST(Numeric, NanStaysNan) {
  for (const Format& f : kFormats) {
    for (const std::uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
      ASSERT_TRUE(is_nan(f, f.narrow(std::bit_cast<float>(bits)))) << name(f.dtype) << " " << bits;
    }
  }
}

// Centroids of blocks of one key are the keys: through widen, a division by one, and narrow. Head dims with and without
// elements behind the last whole vector.
TEST(Numeric, EveryTargetWidensAndNarrowsEveryPattern) {
  for (const Format& f : kFormats) {
    for (const std::int64_t d : {64, 13, 250}) {
      Case c{.dtype = f.dtype, .q_heads = 1, .head_dim = d, .config = {.block_size = 1, .top_k = 1}};
      c.q_lengths = {0};
      c.k_lengths = {(0x10000 + d - 1) / d};
      Data data(c);
      const auto bits_at = [&](std::int64_t i, std::int64_t x) { return static_cast<std::uint16_t>(i * d + x); };
      for (std::int64_t i = 0; i < c.k_lengths[0]; ++i) {
        for (std::int64_t x = 0; x < d; ++x) data.k.as<std::uint16_t>(i, 0, x) = bits_at(i, x);
      }
      for (const Options& options : cpu_kernels(f.dtype)) {
        SCOPED_TRACE(describe(options));
        const Array centroids = Runner(c.problem(), options).pool(data.inputs());
        for (std::int64_t i = 0; i < c.k_lengths[0]; ++i) {
          for (std::int64_t x = 0; x < d; ++x) {
            const auto was = bits_at(i, x), is = centroids.as<std::uint16_t>(i, 0, x);
            ASSERT_TRUE(is == was || (is_nan(f, was) && is_nan(f, is)))
                << name(f.dtype) << " " << was << " became " << is;
          }
        }
      }
    }
  }
}

// So does a table of the caller's: NaN times 1, whose low bits 16-bit formats have no room for.
TEST(Numeric, EveryTargetKeepsNan) {
  constexpr std::uint32_t kPatterns[] = {0x7f800001, 0x7f807fff, 0x7fbfffff, 0x7fc00000,
                                         0x7fffffff, 0xff800001, 0xffffffff};
  for (const Format& f : kFormats) {
    Case c{.dtype = f.dtype, .q_heads = 1, .head_dim = 86, .q_lengths = {0}, .k_lengths = {std::ssize(kPatterns)}};
    Data data(c);
    data.k.fill_value(1.0f);
    Array cos(DType::f32, {c.k_lengths[0], 43}), sin(DType::f32, {c.k_lengths[0], 43});
    cos.fill_value(1.0f);
    sin.fill_value(0.0f);
    for (std::int64_t token = 0; token < c.k_lengths[0]; ++token) {
      for (std::int64_t i = 0; i < 43; i += 3) cos.as<std::uint32_t>(token, i) = kPatterns[token];
    }
    c.rope = Rope{};
    c.rope->cos = cos.tensor();
    c.rope->sin = sin.tensor();
    for (const Options& options : cpu_kernels(f.dtype)) {
      const auto rotated = Runner(c.problem(), options).rope(data.inputs());
      for (std::int64_t token = 0; token < c.k_lengths[0]; ++token) {
        for (std::int64_t x = 0; x < 86; ++x) {
          ASSERT_EQ(is_nan(f, rotated.second.as<std::uint16_t>(token, 0, x)), x % 43 % 3 == 0) << describe(options);
        }
      }
    }
  }
}

// A table of the caller's brings any float through narrow: rotating (0, 1) by (cos, sin) gives (-sin, cos).
TEST(Numeric, EveryTargetNarrowsEveryBoundary) {
  for (const Format& f : kFormats) {
    const std::vector<Rounding> all = roundings(f);
    for (const std::int64_t d : {128, 26}) {
      const std::int64_t pairs = d / 2, tokens = (std::ssize(all) + pairs - 1) / pairs;
      const auto at = [&](std::int64_t token, std::int64_t i) {
        return all[static_cast<std::size_t>(token * pairs + i) % all.size()];
      };
      Array cos(DType::f32, {tokens, pairs}), sin(DType::f32, {tokens, pairs});
      Case c{.dtype = f.dtype, .q_heads = 1, .head_dim = d, .config = {.block_size = 64, .top_k = 1}};
      c.q_lengths = {0};
      c.k_lengths = {tokens};
      Data data(c);
      for (std::int64_t token = 0; token < tokens; ++token) {
        for (std::int64_t i = 0; i < pairs; ++i) {
          cos.as<float>(token, i) = at(token, i).from;
          sin.as<float>(token, i) = -at(token, i).from;
          data.k.set(token, 0, i, 0.0f);
          data.k.set(token, 0, i + pairs, 1.0f);
        }
      }
      c.rope = Rope{};
      c.rope->cos = cos.tensor();
      c.rope->sin = sin.tensor();
      for (const Options& options : cpu_kernels(f.dtype)) {
        SCOPED_TRACE(describe(options));
        const auto rotated = Runner(c.problem(), options).rope(data.inputs());
        for (std::int64_t token = 0; token < tokens; ++token) {
          for (std::int64_t i = 0; i < pairs; ++i) {
            const Rounding r = at(token, i);
            const auto zero_sign = [](std::uint16_t bits) { return bits == 0x8000 ? std::uint16_t{0} : bits; };
            // 0 * cos - 1 * sin: a zero loses its sign.
            ASSERT_EQ(zero_sign(rotated.second.as<std::uint16_t>(token, 0, i)), zero_sign(r.to)) << r.from;
            ASSERT_EQ(zero_sign(rotated.second.as<std::uint16_t>(token, 0, i + pairs)), zero_sign(r.to)) << r.from;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
