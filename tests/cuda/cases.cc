#include "cases.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace moba::test {

namespace {

std::string text(std::int64_t n) { return std::to_string(n); }

// Numbers the cases, so that each has inputs of its own.
std::vector<Case> numbered(std::vector<Case> all) {
  for (std::size_t i = 0; i < all.size(); ++i) all[i].seed = i + 1;
  return all;
}

std::vector<Case> cases_of_sizes() {
  std::vector<Case> all;
  for (const std::int64_t d : kHeadDims) {
    all.push_back({.name = "dim " + text(d),
                   .head_dim = d,
                   .q_lengths = {75},
                   .k_lengths = {75},
                   .inputs = {.tight = true},
                   .outputs = {.tight = true}});
    for (const bool causal : {true, false}) {
      all.push_back({.name = "dim " + text(d) + ", large blocks",
                     .q_heads = 3,
                     .head_dim = d,
                     .q_lengths = {330},
                     .k_lengths = {700},
                     .config = {.block_size = 144, .top_k = 3, .causal = causal}});
    }
  }
  for (const std::int64_t b : {16, 32, 48, 64, 80, 96, 112, 128, 144, 256, 512, 1024, 8192}) {
    for (const std::int64_t d : {32, 64, 128}) {
      const Config causal{.block_size = b, .top_k = 2}, open{.block_size = b, .top_k = 2, .causal = false};
      const std::int64_t length = std::min<std::int64_t>(3 * b + 91, 2300);
      all.push_back({.name = "block " + text(b),
                     .head_dim = d,
                     .q_lengths = {std::min<std::int64_t>(length, 400)},
                     .k_lengths = {length},
                     .config = causal});
      all.push_back({.name = "block " + text(b) + " not causal",
                     .head_dim = d,
                     .q_lengths = {60},
                     .k_lengths = {length},
                     .config = open});
    }
    all.push_back({.name = "as many queries, block " + text(b),
                   .q_heads = 1,
                   .head_dim = 64,
                   .q_lengths = {std::min<std::int64_t>(2 * b + 30, 1100)},
                   .k_lengths = {std::min<std::int64_t>(2 * b + 30, 1100)},
                   .config = {.block_size = b, .top_k = 2}});
  }
  for (const auto& [q_heads, kv_heads] : {std::pair{1, 1}, {4, 4}, {3, 1}, {9, 3}, {8, 2}, {8, 1}, {7, 1}, {64, 1}}) {
    for (const std::int64_t d : {64, 96}) {
      all.push_back({.name = "heads " + text(q_heads) + " on " + text(kv_heads),
                     .q_heads = q_heads,
                     .kv_heads = kv_heads,
                     .head_dim = d,
                     .q_lengths = {140},
                     .k_lengths = {140},
                     .config = {.block_size = 32, .top_k = 3}});
    }
  }
  for (const std::int64_t k : {1, 2, 5, 15, 16, 17, 18, 33, 63, 64}) {  // sm90 gates up to 16, causal 17
    for (const bool causal : {true, false}) {
      for (const std::int64_t d : {64, 128, 192}) {
        all.push_back({.name = "top " + text(k),
                       .head_dim = d,
                       .q_lengths = {90},
                       .k_lengths = {1100},
                       .config = {.block_size = 16, .top_k = k, .causal = causal}});
      }
    }
  }
  for (const std::int64_t k : {18, 19, 64}) {
    all.push_back({.name = "top " + text(k) + " of 19",
                   .head_dim = 64,
                   .q_lengths = {299},
                   .k_lengths = {299},
                   .config = {.block_size = 16, .top_k = k}});
  }
  return all;
}

std::vector<Case> cases_of_lengths(std::int64_t d, const Config& config) {
  std::vector<Case> all;
  const std::string end = config.causal ? "" : " not causal";
  const auto add = [&](Case c) {
    c.name += end;
    c.head_dim = d;
    c.config = config;
    all.push_back(c);
  };
  add({.name = "one token", .q_lengths = {1}, .k_lengths = {1}});
  add({.name = "one query of many keys", .q_heads = 3, .q_lengths = {1}, .k_lengths = {400}});
  add({.name = "few queries", .q_heads = 3, .q_lengths = {37}, .k_lengths = {300}});
  add({.name = "more queries than keys", .q_lengths = {350}, .k_lengths = {270}});
  add({.name = "no keys", .q_lengths = {5}, .k_lengths = {0}});
  add({.name = "no queries", .q_lengths = {0}, .k_lengths = {50}});
  add({.name = "nothing", .q_lengths = {0}, .k_lengths = {0}});
  add({.name = "no batch", .q_lengths = {}, .k_lengths = {}});
  add({.name = "packed",
       .q_heads = 4,
       .kv_heads = 2,
       .q_lengths = {0, 1, 200, 33, 1, 90, 4, 3, 130},
       .k_lengths = {0, 1, 200, 150, 140, 60, 0, 2, 130},
       .inputs = {.gap = 8, .offset = 8},
       .outputs = {.gap = 24, .offset = 40}});
  add({.name = "many sequences",
       .q_heads = 3,
       .q_lengths = std::vector<std::int64_t>(70, 5),
       .k_lengths = std::vector<std::int64_t>(70, 9)});
  add({.name = "strides",
       .q_heads = 6,
       .kv_heads = 3,
       .q_lengths = {120},
       .k_lengths = {240},
       .inputs = {.gap = 56, .swapped = true, .offset = 24},
       .outputs = {.gap = 16, .swapped = true, .offset = 8}});
  for (const double scale : {0.0, 0.03, 1.5}) {
    Case c{.name = "scale " + std::to_string(scale), .q_lengths = {150}, .k_lengths = {150}};
    add(c);
    all.back().config.scale = scale;
  }
  add({.name = "long", .q_heads = 4, .kv_heads = 2, .q_lengths = {1100}, .k_lengths = {1300}});
  return all;
}

}  // namespace

std::vector<Case> small_cases() {
  std::vector<Case> all;
  for (const auto& [d, block_size] : {std::pair{32, 16}, {64, 48}, {128, 64}, {128, 128}, {128, 144}, {192, 32}}) {
    for (const bool causal : {true, false}) {
      all.push_back({.name = "small",
                     .dtype = causal ? DType::bf16 : DType::f16,
                     .q_heads = 4,
                     .kv_heads = 2,
                     .head_dim = d,
                     .q_lengths = {0, 1, 3 * block_size + 5, 20},
                     .k_lengths = {3, 1, 3 * block_size + 5, 4 * block_size - 1},
                     .config = {.block_size = block_size, .top_k = 2, .causal = causal},
                     .inputs = {.gap = 8, .offset = 8},
                     .outputs = {.gap = 8, .swapped = causal}});
    }
  }
  return numbered(all);
}

std::vector<Case> grid_cases() {
  std::vector<Case> sizes = cases_of_sizes(), all;
  for (const bool causal : {true, false}) {
    for (const auto& [d, block_size] : {std::pair{64, 32}, {128, 64}, {128, 144}, {96, 48}}) {
      const auto more = cases_of_lengths(d, {.block_size = block_size, .top_k = 3, .causal = causal});
      sizes.insert(sizes.end(), more.begin(), more.end());
    }
  }
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sizes[i].dtype = DType::bf16;
    all.push_back(sizes[i]);
    if (i % 3 != 0) continue;  // the types differ in little
    sizes[i].dtype = DType::f16;
    all.push_back(sizes[i]);
  }
  return numbered(all);
}

Case many_sequences() {
  Case c{
      .name = "3000 sequences", .dtype = DType::bf16, .q_heads = 2, .head_dim = 64, .q_lengths = {}, .k_lengths = {}};
  for (std::int64_t i = 0; i < 3000; ++i) {
    c.q_lengths.push_back(i * 7 % 41);
    c.k_lengths.push_back(i % 5 == 0 ? i * 7 % 41 : i * 11 % 41);
  }
  c.config = {.block_size = 16, .top_k = 2};
  return c;
}

Case random_case(std::uint64_t seed) {
  Random random(seed);
  const auto one_of = [&](const auto& values) {
    return values[static_cast<std::size_t>(random.integer(0, std::ssize(values) - 1))];
  };
  const auto layout = [&] {
    Layout l{
        .gap = one_of(std::array{0, 0, 0, 8, 40}), .swapped = random.one_in(3), .offset = 8 * random.integer(0, 7)};
    l.tight = random.one_in(3);
    return l;
  };
  Case c{.name = "random", .seed = seed};
  c.dtype = one_of(kTypes);
  c.head_dim = one_of(std::array{32, 64, 64, 64, 96, 128, 128, 128, 192, 256});
  c.kv_heads = random.integer(1, 3);
  c.q_heads = c.kv_heads * one_of(std::array{1, 1, 2, 3, 4, 5, 8});
  c.config.block_size = std::int64_t{16} * one_of(std::array{1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 16, 20, 32, 64});
  c.config.top_k = random.one_in(4) ? random.integer(1, 64) : random.integer(1, 8);
  c.config.causal = !random.one_in(3);
  if (random.one_in(6)) c.config.scale = one_of(std::array{0.0, 0.01, 0.5});
  c.q_lengths.clear();
  c.k_lengths.clear();
  const int batch = one_of(std::array{1, 1, 1, 2, 3, 9});
  const std::int64_t most = (batch > 3 ? 200 : 700) / std::max<std::int64_t>(1, c.q_heads / 6);
  for (int s = 0; s < batch; ++s) {
    c.k_lengths.push_back(random.one_in(5) ? random.integer(0, 2) : random.integer(0, 2 * most));
    const bool equal = random.one_in(2) && c.k_lengths.back() <= most;
    c.q_lengths.push_back(equal              ? c.k_lengths.back()
                          : random.one_in(6) ? random.integer(0, 2)
                                             : random.integer(0, most));
  }
  c.inputs = layout();
  c.outputs = layout();
  return c;
}

void Lie::tell(Data& data) const {
  Array& table = q ? *data.cu_seqlens_q : *data.cu_seqlens_k;
  for (std::size_t i = 0; i < entries.size(); ++i) table.as<std::int32_t>(static_cast<std::int64_t>(i)) = entries[i];
}

std::vector<Lie> tables_that_lie() {
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  return {{true, {1, 60, 99}},      {true, {-1, 60, 99}},      {true, {0, 100, 99}},          {true, {0, -1, 99}},
          {true, {0, 60, 98}},      {true, {0, 60, 100}},      {true, {0, 61, 99}},           {true, {0, 38, 99}},
          {true, {0, kMost, 99}},   {true, {99, 60, 0}},       {false, {1, 75, 174}},         {false, {0, 175, 174}},
          {false, {0, 75, 173}},    {false, {0, 75, 175}},     {false, {0, 100, 174}},        {false, {0, 74, 174}},
          {false, {0, kMost, 174}}, {false, {0, -kMost, 174}}, {false, {kMost, kMost, kMost}}};
}

FewPositions::FewPositions()
    : cos(DType::f32, {20, 32}, {.tight = true}),
      sin(DType::f32, {20, 32}, {.tight = true}),
      c{.dtype = DType::bf16, .head_dim = 64, .q_lengths = {30, 5}, .k_lengths = {10, 20}, .config = {.top_k = 1}} {
  cos.fill(1);
  sin.fill(2);
  c.config.block_size = 16;
  c.rope = Rope{.cos = std::as_const(cos).tensor(), .sin = std::as_const(sin).tensor()};
}

}  // namespace moba::test
