// Every public function: whatever the arguments, it succeeds or refuses them by moba::Error, touching no memory that it
// was not given.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "calls.h"

namespace moba::fuzz {

namespace {

[[noreturn]] void fail(std::string_view function, std::string_view what) {
  std::cerr << function << ": " << what << std::endl;
  std::abort();
}

// How messages begin that name no view: fields of problems and options, and what sequences come to.
constexpr std::string_view kNames[] = {
    "batch",  "cache.",  "config.",    "dtype",      "head_dim",   "kv_heads", "length of sequence ",
    "max_",   "memory",  "new tokens", "options.",   "plan",       "q_heads",  "rope.",
    "tensor", "total_k", "total_q",    "selection.", "cu_seqlens",
};

void check_message(std::string_view function, const Error& error, const Views* views) {
  const std::string_view message = error.what();
  const auto begins = [&](std::string_view name) { return message.starts_with(name); };
  const bool named = std::ranges::any_of(kNames, begins) || (views != nullptr && views->named_by(message));
  if (!named || message.find('\n') != message.npos || message.find("allowed") == message.npos) fail(function, message);
}

}  // namespace

void judge(std::string_view function, const Views& views, const std::function<void()>& call) {
  const std::vector<std::byte> before = views.snapshot();
  try {
    call();
  } catch (const Error& error) {
    check_message(function, error, &views);
    const std::vector<std::byte> after = views.snapshot();
    if (std::memcmp(after.data(), before.data(), before.size()) != 0)
      fail(function, std::string("refused, but wrote: ") + error.what());
  }
}

bool accepted(std::string_view function, const std::function<void()>& call) {
  try {
    call();
    return true;
  } catch (const Error& error) {
    check_message(function, error, nullptr);
    return false;
  }
}

Options draw_options(Bytes& bytes) {
  Options options;
  options.threads = static_cast<int>(bytes.pick<std::int64_t>({1, 1, 2, 3, 0, -1, 1024, 1025, 0x7fffffff}));
  if (bytes.one_in(4)) options.backend = static_cast<Backend>(bytes.number(0, 3));
  const std::vector<std::string> targets = cpu_targets();
  const auto target = static_cast<std::size_t>(bytes.number(0, std::ssize(targets) + 1));
  if (target > 0) options.cpu_target = target > targets.size() ? "none of them" : targets[target - 1];
  if (bytes.one_in(8)) options.bf16_products = static_cast<Bf16Products>(bytes.number(0, 3));
  if (bytes.one_in(32)) options.workspace_limit = static_cast<std::size_t>(bytes.odd_number());
  return options;
}

Config draw_config(Bytes& bytes) {
  Config config;
  config.block_size = bytes.number(1, 20);
  config.top_k = bytes.number(1, 6);
  config.causal = !bytes.one_in(3);
  if (bytes.one_in(8)) config.scale = bytes.odd_real();
  if (bytes.one_in(32)) config.block_size = bytes.odd_number();
  if (bytes.one_in(32)) config.top_k = bytes.odd_number();
  return config;
}

Rope draw_rope(Bytes& bytes, std::int64_t head_dim, std::int64_t positions, Views& tables) {
  Rope rope;
  rope.style = static_cast<RopeStyle>(bytes.one_in(32) ? 7 : bytes.number(0, 1));
  rope.rotary_dim = head_dim / 4 * 2;
  if (bytes.one_in(8)) rope.rotary_dim = bytes.odd_number();
  rope.scaling = static_cast<RopeScaling>(bytes.number(0, bytes.one_in(16) ? 5 : 3));
  rope.factor = 4;
  if (bytes.one_in(8)) {
    double* const fields[] = {&rope.base,
                              &rope.factor,
                              &rope.original_max_position,
                              &rope.low_freq_factor,
                              &rope.high_freq_factor,
                              &rope.beta_fast,
                              &rope.beta_slow,
                              &rope.attention_factor.emplace(1.0)};
    *fields[bytes.number(0, std::ssize(fields) - 1)] = bytes.odd_real();
  }
  if (!bytes.one_in(4)) return rope;
  const int cos = tables.add("rope.cos", DType::f32, {positions, head_dim / 4});
  const int sin = tables.add("rope.sin", DType::f32, {positions, head_dim / 4});
  if (!tables.place()) return rope;
  rope.cos = tables[cos];
  rope.sin = tables[sin];
  return rope;
}

}  // namespace moba::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  moba::fuzz::Bytes bytes(data, size);
  if (bytes.one_in(2)) {
    moba::fuzz::call_cache(bytes);
  } else {
    moba::fuzz::call_attention(bytes);
  }
  return 0;
}
