// Every problem and option that is refused, one change at a time, by an Error that names the argument.
#include <cmath>
#include <functional>
#include <limits>

#include "support.h"

namespace moba::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

struct Refusal {
  std::string argument;  // what the message must hold
  std::function<void(Problem&, Options&)> change;
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

#define CHANGE [](Problem & p, Options & o)
#define UNUSED (void)p, (void)o

// A change of the problem's rope, of the scaling named.
Refusal rope_refusal(std::string argument, RopeScaling scaling, std::function<void(Rope&)> change) {
  return {std::move(argument), [scaling, change = std::move(change)](Problem& p, Options&) {
            p.rope = rope_of(scaling);
            change(*p.rope);
          }};
}

std::vector<Refusal> refusals() { std::vector<Refusal> all{{"dtype", CHANGE{UNUSED, p.dtype = DType::i32; }
}  // namespace
, {"dtype", CHANGE{UNUSED, p.dtype = DType::i64;
}  // namespace moba::test
}
, {"dtype", CHANGE{UNUSED, p.dtype = static_cast<DType>(77);
}
}
, {"kv_heads", CHANGE{UNUSED, p.kv_heads = 0;
}
}
, {"kv_heads", CHANGE{UNUSED, p.kv_heads = -2;
}
}
, {"q_heads", CHANGE{UNUSED, p.q_heads = 0;
}
}
, {"q_heads", CHANGE{UNUSED, p.q_heads = -4;
}
}
, {"q_heads", CHANGE{UNUSED, p.q_heads = 5;
}
}
, {"q_heads", CHANGE{UNUSED, p.q_heads = 1;
}
}
, {"head_dim", CHANGE{UNUSED, p.head_dim = 7;
}
}
, {"head_dim", CHANGE{UNUSED, p.head_dim = 257;
}
}
, {"head_dim", CHANGE{UNUSED, p.head_dim = 0;
}
}
, {"head_dim", CHANGE{UNUSED, p.head_dim = -64;
}
}
, {"batch", CHANGE{UNUSED, p.batch = -1;
}
}
, {"batch", CHANGE{UNUSED, p.batch = 0;
}
}
, {"batch", CHANGE{UNUSED, p.batch = kMost;
}
}
, {"total_q", CHANGE{UNUSED, p.total_q = -1;
}
}
, {"total_k", CHANGE{UNUSED, p.total_k = -1;
}
}
, {"max_seqlen_q", CHANGE{UNUSED, p.max_seqlen_q = -1;
}
}
, {"max_seqlen_k", CHANGE{UNUSED, p.max_seqlen_k = -1;
}
}
, {"block_size", CHANGE{UNUSED, p.config.block_size = 0;
}
}
, {"block_size", CHANGE{UNUSED, p.config.block_size = -128;
}
}
, {"top_k", CHANGE{UNUSED, p.config.top_k = 0;
}
}
, {"top_k", CHANGE{UNUSED, p.config.top_k = -1;
}
}
, {"scale", CHANGE{UNUSED, p.config.scale = kInf;
}
}
, {"scale", CHANGE{UNUSED, p.config.scale = -kInf;
}
}
, {"scale", CHANGE{UNUSED, p.config.scale = kNaN;
}
}
,
    // Sizes that no memory holds, or that the rows of a selection cannot count.
    {"total_q", CHANGE{UNUSED, p.total_q = std::int64_t{1} << 30;
}
}
, {"total_q", CHANGE{UNUSED, p.total_q = kMost;
}
}
, {"total_k", CHANGE{UNUSED, p.total_k = std::int64_t{1} << 31;
}
}
, {"total_k", CHANGE{UNUSED, p.total_k = kMost;
}
}
, {"total_q * q_heads", CHANGE{UNUSED, p.total_q = 1 << 30, p.q_heads = p.kv_heads = 1 << 22;
}
}
, {"total_k * kv_heads", CHANGE{UNUSED, p.total_q = 0, p.total_k = 1 << 30, p.q_heads = p.kv_heads = 1 << 22;
}
}
, {"top_k", CHANGE{UNUSED, p.total_q = p.total_k = p.max_seqlen_k = 1 << 30, p.q_heads = 2,
                   p.config = {.block_size = 1, .top_k = kMost};
}
}
, {"backend", CHANGE{UNUSED, o.backend = static_cast<Backend>(9);
}
}
, {"threads", CHANGE{UNUSED, o.threads = -1;
}
}
, {"threads", CHANGE{UNUSED, o.threads = 100000;
}
}
, {"cpu_target", CHANGE{UNUSED, o.cpu_target = "AVX9";
}
}
, {"cpu_target", CHANGE{UNUSED, o.cpu_target = "avx2";
}
}
, {"bf16_products", CHANGE{UNUSED, o.bf16_products = Bf16Products::dot;
}
}
, {"bf16_products", CHANGE{UNUSED, o.bf16_products = static_cast<Bf16Products>(9);
}
}
, {"bf16_products",
   CHANGE{UNUSED, p.dtype = DType::bf16, o.bf16_products = Bf16Products::dot, o.cpu_target = cpu_targets().back();
}
}
,
}
;
if (!bf16_support().available) {
    all.push_back({"bf16_products", CHANGE { UNUSED, p.dtype = DType::bf16, o.bf16_products = Bf16Products::dot;
}
});
}
const auto add = [&](std::string argument, RopeScaling scaling, std::function<void(Rope&)> change) {
  all.push_back(rope_refusal(std::move(argument), scaling, std::move(change)));
};
for (const std::int64_t dim : {-2, 1, 7, 63, 65, 66, 128}) {
  add("rope.rotary_dim", RopeScaling::none, [=](Rope& r) { r.rotary_dim = dim; });
}
for (const double base : {0.0, -1.0, kInf, kNaN}) add("rope.base", RopeScaling::none, [=](Rope& r) { r.base = base; });
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
const auto add_table = [&](std::string argument, ConstTensor cos, ConstTensor sin) {
  add(std::move(argument), RopeScaling::none, [=](Rope& r) { r.cos = cos, r.sin = sin; });
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
all.push_back({"max_seqlen_q", [=](Problem& p, Options&) {  // queries before position 0
                 p.total_q = 300, p.max_seqlen_q = 130;
                 p.rope = rope_of(RopeScaling::none);
                 p.rope->cos = p.rope->sin = rows(200);
               }});
return all;
}

#undef CHANGE
#undef UNUSED

TEST(RefusedPlans, OneChangeAtATime) {
  EXPECT_NO_THROW(Plan(good_problem(), {}));
  for (const RopeScaling scaling : {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn}) {
    Problem p = good_problem();
    p.rope = rope_of(scaling);
    EXPECT_NO_THROW(Plan(p, {}));
  }
  std::size_t number = 0;
  for (const Refusal& refusal : refusals()) {
    SCOPED_TRACE(::testing::Message() << "refusal " << number++ << ", of " << refusal.argument);
    Problem p = good_problem();
    Options o;
    refusal.change(p, o);
    try {
      const Plan plan(p, o);
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(refusal.argument), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      EXPECT_NE(message.find("allowed"), std::string::npos) << message;
    }
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
  for (const std::string& target : cpu_targets()) EXPECT_NO_THROW(Plan(good_problem(), {.cpu_target = target}));
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
  EXPECT_THROW(plan.arithmetic(), Error);  // not one sequence
}

}  // namespace
}  // namespace moba::test
