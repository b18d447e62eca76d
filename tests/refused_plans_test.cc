// Every problem and option that is refused, one change at a time, by an Error that names the argument.
#include <cmath>
#include <functional>
#include <limits>

#include "refusals.h"
#include "support.h"

namespace moba::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

// One change that is refused, and what the message must hold.
struct BadProblem {
  const char* argument;
  void (*change)(Problem&);
};
struct BadOptions {
  const char* argument;
  void (*change)(Options&);
};
struct BadRope {
  const char* argument;
  RopeScaling scaling;
  std::function<void(Rope&)> change;
};

Problem good_problem() {
  Problem p{.q_heads = 4,
            .kv_heads = 2,
            .head_dim = 64,
            .batch = 2,
            .total_q = 100,
            .total_k = 200,
            .max_seqlen_q = 60,
            .max_seqlen_k = 120};
  p.config = {.block_size = 16, .top_k = 3};
  return p;
}

Rope rope_of(RopeScaling scaling) {
  Rope rope;
  rope.scaling = scaling;
  rope.factor = 4;
  return rope;
}

constexpr BadProblem kBadProblems[] = {
    {"dtype", [](Problem& p) { p.dtype = DType::i32; }},
    {"dtype", [](Problem& p) { p.dtype = DType::i64; }},
    {"dtype", [](Problem& p) { p.dtype = static_cast<DType>(77); }},
    {"kv_heads", [](Problem& p) { p.kv_heads = 0; }},
    {"kv_heads", [](Problem& p) { p.kv_heads = -2; }},
    {"q_heads", [](Problem& p) { p.q_heads = 0; }},
    {"q_heads", [](Problem& p) { p.q_heads = -4; }},
    {"q_heads", [](Problem& p) { p.q_heads = 5; }},
    {"q_heads", [](Problem& p) { p.q_heads = 1; }},
    {"head_dim", [](Problem& p) { p.head_dim = 7; }},
    {"head_dim", [](Problem& p) { p.head_dim = 257; }},
    {"head_dim", [](Problem& p) { p.head_dim = 0; }},
    {"head_dim", [](Problem& p) { p.head_dim = -64; }},
    {"batch", [](Problem& p) { p.batch = -1; }},
    {"batch", [](Problem& p) { p.batch = 0; }},
    {"batch", [](Problem& p) { p.batch = kMost; }},
    {"batch", [](Problem& p) { p.batch = 0, p.total_q = p.total_k = kMost; }},
    {"batch", [](Problem& p) { p.batch = 0, p.total_q = 0, p.total_k = kMost; }},
    {"total_q", [](Problem& p) { p.total_q = -1; }},
    {"total_k", [](Problem& p) { p.total_k = -1; }},
    {"max_seqlen_q", [](Problem& p) { p.max_seqlen_q = -1; }},
    {"max_seqlen_k", [](Problem& p) { p.max_seqlen_k = -1; }},
    {"config.block_size", [](Problem& p) { p.config.block_size = 0; }},
    {"config.block_size", [](Problem& p) { p.config.block_size = -128; }},
    {"config.top_k", [](Problem& p) { p.config.top_k = 0; }},
    {"config.top_k", [](Problem& p) { p.config.top_k = -1; }},
    {"config.scale", [](Problem& p) { p.config.scale = kInf; }},
    {"config.scale", [](Problem& p) { p.config.scale = -kInf; }},
    {"config.scale", [](Problem& p) { p.config.scale = kNaN; }},
    // Times log2(e) it is more than float32 holds.
    {"config.scale", [](Problem& p) { p.config.scale = 1e39; }},
    {"config.scale", [](Problem& p) { p.config.scale = -1e39; }},
    {"config.scale", [](Problem& p) { p.config.scale = 3e38; }},
    {"config.scale", [](Problem& p) { p.config.scale = -3e38; }},
    // Sizes that no memory holds, or that the rows of a selection cannot count.
    {"total_q", [](Problem& p) { p.total_q = std::int64_t{1} << 30; }},
    {"total_q", [](Problem& p) { p.total_q = kMost; }},
    {"total_k", [](Problem& p) { p.total_k = std::int64_t{1} << 31; }},
    {"total_k", [](Problem& p) { p.total_k = kMost; }},
    {"total_q * q_heads", [](Problem& p) { p.total_q = 1 << 30, p.q_heads = p.kv_heads = 1 << 22; }},
    {"total_k * kv_heads", [](Problem& p) { p.total_q = 0, p.total_k = 1 << 30, p.q_heads = p.kv_heads = 1 << 22; }},
};

constexpr BadOptions kBadOptions[] = {
    {"options.backend", [](Options& o) { o.backend = static_cast<Backend>(9); }},
    {"options.threads", [](Options& o) { o.threads = -1; }},
    {"options.threads", [](Options& o) { o.threads = 100000; }},
    {"options.cpu_target", [](Options& o) { o.cpu_target = "AVX9"; }},
    {"options.cpu_target", [](Options& o) { o.cpu_target = "avx2"; }},
    {"options.bf16_products", [](Options& o) { o.bf16_products = Bf16Products::dot; }},
    {"options.bf16_products", [](Options& o) { o.bf16_products = static_cast<Bf16Products>(9); }},
};

std::vector<BadRope> bad_ropes() {
  std::vector<BadRope> all;
  const auto add = [&](const char* argument, RopeScaling scaling, std::function<void(Rope&)> change) {
    all.push_back({argument, scaling, std::move(change)});
  };
  for (const std::int64_t dim : {-2, 1, 7, 63, 65, 66, 128}) {
    add("rope.rotary_dim", RopeScaling::none, [=](Rope& r) { r.rotary_dim = dim; });
  }
  // With the smallest a frequency, base^(-62 / 64), is no finite number.
  for (const RopeScaling scaling : {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
    for (const double base : {0.0, -1.0, kInf, kNaN, 0.99, 1e-320, 5e-324})
      add("rope.base", scaling, [=](Rope& r) { r.base = base; });
  }
  add("rope.base", RopeScaling::yarn, [](Rope& r) { r.base = 1.0; });
  add("rope.style", RopeScaling::none, [](Rope& r) { r.style = static_cast<RopeStyle>(5); });
  add("rope.scaling", RopeScaling::none, [](Rope& r) { r.scaling = static_cast<RopeScaling>(5); });
  for (const RopeScaling scaling : {RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
    for (const double factor : {0.0, 0.99, -4.0, kInf, kNaN})
      add("rope.factor", scaling, [=](Rope& r) { r.factor = factor; });
  }
  for (const RopeScaling scaling : {RopeScaling::llama3, RopeScaling::yarn}) {
    for (const double length : {0.0, -1.0, kInf, kNaN}) {
      add("rope.original_max_position", scaling, [=](Rope& r) { r.original_max_position = length; });
    }
  }
  for (const double bad : {0.0, -1.0, kInf, kNaN}) {
    add("rope.low_freq_factor", RopeScaling::llama3, [=](Rope& r) { r.low_freq_factor = bad; });
    add("rope.high_freq_factor", RopeScaling::llama3, [=](Rope& r) { r.high_freq_factor = bad; });
    add("rope.beta_fast", RopeScaling::yarn, [=](Rope& r) { r.beta_fast = bad; });
    add("rope.beta_slow", RopeScaling::yarn, [=](Rope& r) { r.beta_slow = bad; });
    add("rope.attention_factor", RopeScaling::yarn, [=](Rope& r) { r.attention_factor = bad; });
  }
  add("rope.high_freq_factor", RopeScaling::llama3, [](Rope& r) { r.high_freq_factor = r.low_freq_factor; });
  add("rope.beta_fast", RopeScaling::yarn, [](Rope& r) { r.beta_fast = r.beta_slow; });

  // A table of the caller's: 120 rows of 32 pairs would do.
  static const std::vector<float> table(std::size_t{200} * 64);
  const auto rows = [](std::int64_t count, std::int64_t pairs = 32) {
    return ConstTensor(table.data(), DType::f32, {count, pairs});
  };
  const auto add_table = [&](const char* argument, ConstTensor cos, ConstTensor sin) {
    add(argument, RopeScaling::none, [=](Rope& r) { r.cos = cos, r.sin = sin; });
  };
  add_table("rope.cos", rows(119), rows(119));
  add_table("rope.sin", rows(120), rows(121));
  add_table("rope.sin", rows(120), {});
  add_table("rope.cos", {}, rows(120));
  add_table("rope.cos", rows(120, 64), rows(120, 64));
  add_table("rope.sin", rows(120), rows(120, 31));
  add_table("rope.cos", ConstTensor(table.data(), DType::bf16, {120, 32}), rows(120));
  add_table("rope.sin", rows(120), ConstTensor(table.data(), DType::i32, {120, 32}));
  add_table("rope.cos", ConstTensor(table.data(), DType::f32, {120, 32, 1}), rows(120));
  add_table("rope.cos", ConstTensor(nullptr, DType::f32, {120, 32}), rows(120));
  const auto with = [&](auto change) {
    ConstTensor t = rows(120);
    change(t);
    return t;
  };
  add_table("rope.cos.stride[1]", with([](ConstTensor& t) { t.stride[1] = 2; }), rows(120));
  add_table("rope.sin.stride[0]", rows(120), with([](ConstTensor& t) { t.stride[0] = -32; }));
  add_table("rope.cos.device", with([](ConstTensor& t) { t.device = Device::cuda; }), rows(120));
  return all;
}

void expect_refused(const Problem& problem, const Options& options, const std::string& argument) {
  try {
    const Plan plan(problem, options);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_TRUE(refuses(error.what(), argument));
  }
}

TEST(RefusedPlans, Problems) {
  EXPECT_NO_THROW(Plan(good_problem(), {}));
  for (const BadProblem& bad : kBadProblems) {
    SCOPED_TRACE(::testing::Message() << "row " << &bad - kBadProblems << ", " << bad.argument);
    Problem p = good_problem();
    bad.change(p);
    expect_refused(p, {}, bad.argument);
  }
  Problem p = good_problem();  // ids that no memory holds
  p.q_heads = 2;
  p.total_q = p.total_k = p.max_seqlen_k = 1 << 30;
  p.config = {.block_size = 1, .top_k = kMost};
  expect_refused(p, {}, "total_q * q_heads * min(top_k, blocks)");
}

TEST(RefusedPlans, Options) {
  for (const BadOptions& bad : kBadOptions) {
    SCOPED_TRACE(::testing::Message() << "row " << &bad - kBadOptions << ", " << bad.argument);
    Options o;
    bad.change(o);
    expect_refused(good_problem(), o, bad.argument);
  }
}

// Why there is no cuda backend is said by the plan as by cuda_support().
TEST(RefusedPlans, CudaWithoutADevice) {
  const CudaSupport support = cuda_support();
  if (!support.devices.empty()) GTEST_SKIP() << "there is a GPU: " << support.devices.front().name;
  EXPECT_NE(support.problem, "");
  Problem p = good_problem();
  p.dtype = DType::bf16;
  expect_refused(p, {.backend = Backend::cuda}, "options.backend");
  expect_refused(p, {.backend = Backend::cuda}, "cuda");
  if (support.built) return;
  EXPECT_NE(support.problem.find("built without CUDA"), std::string::npos) << support.problem;
  expect_refused(p, {.backend = Backend::cuda}, support.problem);
}

TEST(RefusedPlans, Bfloat16PairProducts) {
  Problem p = good_problem();
  p.dtype = DType::bf16;
  Options o{.cpu_target = cpu_targets().back(), .bf16_products = Bf16Products::dot};
  expect_refused(p, o, "options.bf16_products");  // plain C++, at the latest
  if (bf16_support().available) return;
  o.cpu_target = "";
  expect_refused(p, o, "options.bf16_products");
}

TEST(RefusedPlans, Ropes) {
  for (const RopeScaling scaling : {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
    Problem p = good_problem();
    p.rope = rope_of(scaling);
    EXPECT_NO_THROW(Plan(p, {}));
  }
  std::size_t number = 0;
  for (const BadRope& bad : bad_ropes()) {
    SCOPED_TRACE(::testing::Message() << "refusal " << number++ << ", " << bad.argument);
    Problem p = good_problem();
    p.rope = rope_of(bad.scaling);
    bad.change(*p.rope);
    expect_refused(p, {}, bad.argument);
  }
}

// The edges of what is allowed.
TEST(RefusedPlans, EdgesAreAccepted) {
  for (const std::int64_t d : {8, 9, 255, 256}) {
    Problem p = good_problem();
    p.head_dim = d;
    EXPECT_NO_THROW(Plan(p, {}));
  }
  Problem p = good_problem();
  p.batch = p.total_q = p.total_k = 0;
  EXPECT_NO_THROW(Plan(p, {}));
  p.batch = 5;
  EXPECT_NO_THROW(Plan(p, {}));
  p = good_problem();
  p.max_seqlen_k = 100000;  // more than there are: cut to the total
  EXPECT_EQ(Plan(p).problem().max_seqlen_k, 200);
  p = good_problem();
  p.total_q = p.max_seqlen_q = (std::int64_t{1} << 30) - 1;  // rows up to 2^31 - 1
  EXPECT_NO_THROW(Plan(p, {.threads = 1}));
  p.total_q = std::int64_t{1} << 30;
  EXPECT_THROW(Plan(p, {.threads = 1}), Error);
  for (const double scale : {0.0, 2e38, -2e38}) {
    p = good_problem();
    p.config.scale = scale;
    EXPECT_NO_THROW(Plan(p, {}));
  }
  for (const double base : {1.0, 1e300}) {
    p = good_problem();
    p.rope = rope_of(RopeScaling::none);
    p.rope->base = base;
    EXPECT_NO_THROW(Plan(p, {}));
  }
  p = good_problem();  // longer queries than keys, with a table: whether it has the rows shows in cu_seqlens
  const std::vector<float> table(std::size_t{120} * 32);
  p.total_q = 300, p.max_seqlen_q = 130;
  p.rope = rope_of(RopeScaling::none);
  p.rope->cos = p.rope->sin = ConstTensor(table.data(), DType::f32, {120, 32});
  EXPECT_NO_THROW(Plan(p, {}));
  for (const std::string& target : cpu_targets()) EXPECT_NO_THROW(Plan(good_problem(), {.cpu_target = target}));
}

TEST(RefusedPlans, MemoryOfASelection) {
  const Plan plan(good_problem());
  std::vector<std::int64_t> memory(plan.selection_bytes() / 8 + 1);
  const auto bytes = std::as_writable_bytes(std::span(memory));
  const auto refused = [&](std::span<std::byte> given, const std::string& message) {
    try {
      make_selection(plan, given);
      ADD_FAILURE() << "accepted: " << message;
    } catch (const Error& error) {
      EXPECT_EQ(error.what(), message);
    }
  };
  const std::string needed = std::to_string(plan.selection_bytes());
  EXPECT_NO_THROW(make_selection(plan, bytes));
  refused(bytes.first(8), "memory: is 8 bytes; allowed: at least plan.selection_bytes(), " + needed);
  refused({}, "memory: is 0 bytes; allowed: at least plan.selection_bytes(), " + needed);
  refused({static_cast<std::byte*>(nullptr), bytes.size()}, "memory: is a null pointer; allowed: a pointer");
  refused(bytes.subspan(4), "memory: is not aligned; allowed: addresses that are multiples of 8");
}

TEST(RefusedPlans, Arithmetic) {
  const Plan plan(good_problem());
  const auto message = [&](const std::vector<std::int64_t>& q, const std::vector<std::int64_t>& k) {
    try {
      plan.arithmetic(q, k);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message({0, 40, 100}, {0, 100, 200}), "");
  EXPECT_NE(message({0, 100}, {0, 100, 200}).find("cu_seqlens_q"), std::string::npos);
  EXPECT_NE(message({0, 40, 99}, {0, 100, 200}).find("cu_seqlens_q"), std::string::npos);
  EXPECT_NE(message({1, 40, 100}, {0, 100, 200}).find("cu_seqlens_q[0]"), std::string::npos);
  EXPECT_NE(message({0, 61, 100}, {0, 100, 200}).find("cu_seqlens_q"), std::string::npos);
  EXPECT_NE(message({0, 40, 100}, {0, 201, 200}).find("cu_seqlens_k"), std::string::npos);
  EXPECT_NE(message({0, 40, 100}, {0, 79, 200}).find("cu_seqlens_k"), std::string::npos);
  try {
    plan.arithmetic();  // not one sequence
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "batch: is 2; allowed: 0 or 1 where cu_seqlens are not given");
  }
}

// Whatever the caller gave: a refusal is one line.
TEST(RefusedPlans, OfTextWithLinesAreOneLine) {
  Problem problem;
  problem.total_q = problem.total_k = 1;
  Options options;
  options.cpu_target = "a\nb";
  try {
    const Plan plan(problem, options);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("a?b"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace moba::test
