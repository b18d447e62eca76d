// backward of values that are not finite: what they reach, and what not.
#include <algorithm>
#include <cmath>

#include "support.h"

namespace moba::test {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

struct Strange {
  Case c{.q_heads = 4,
         .kv_heads = 2,
         .head_dim = 20,
         .q_lengths = {200},
         .k_lengths = {200},
         .config = {.block_size = 40, .top_k = 2}};
  Data data{c};
  Array dout = noise_dout(c);
};

// Rows that chose a block and see a key of it, from ids.
bool sees(const Case& c, const Chosen& chosen, std::int64_t token, std::int64_t head, std::int64_t key) {
  const auto blocks = chosen.row(token, head);
  return key <= token && std::ranges::count(blocks, key / c.config.block_size) > 0;
}

// A NaN in a key or its value reaches the gradients of the rows that see it and, through those, of the keys that these
// see; nothing else.
TEST(BackwardNonfinite, KeysReachOnlyWhoSeesThem) {
  for (const DType dtype : kTypes) {
    for (const bool in_key : {true, false}) {
      Strange s;
      s.c.dtype = dtype;
      s.data = Data(s.c);
      s.dout = noise_dout(s.c);
      std::vector<Options> kernels = cpu_kernels(dtype);
      kernels.push_back(reference_options());
      for (const Options& options : kernels) {
        SCOPED_TRACE(describe(options));
        Runner run(s.c.problem(), options);
        Data clean = s.data, spoiled = s.data;
        Chosen chosen = run.select(clean.inputs());
        (in_key ? spoiled.k : spoiled.v).set(70, 0, 3, NAN);
        Attention good = run.attend(clean.inputs(), chosen), bad = run.attend(spoiled.inputs(), chosen);
        const Slopes expected = run.backward(clean.inputs(), chosen, good, s.dout);
        const Slopes got = run.backward(spoiled.inputs(), chosen, bad, s.dout);
        std::vector<bool> key_reached(200);
        for (std::int64_t token = 0; token < 200; ++token) {
          for (std::int64_t head = 0; head < 4; ++head) {
            const bool reached = head < 2 && sees(s.c, chosen, token, head, 70);
            EXPECT_EQ(std::isnan(got.dq.get(token, head, 5)), reached) << token << " " << head;
            if (!reached) {
              EXPECT_EQ(got.dq.get(token, head, 5), expected.dq.get(token, head, 5)) << token << " " << head;
            }
            for (std::int64_t key = 0; reached && key < 200; ++key) {
              if (sees(s.c, chosen, token, head, key)) key_reached[key] = true;
            }
          }
        }
        for (std::int64_t key = 0; key < 200; ++key) {
          EXPECT_EQ(std::isnan(got.dk.get(key, 0, 5)), key_reached[key]) << key;
          EXPECT_FALSE(std::isnan(got.dk.get(key, 1, 5)) || std::isnan(got.dv.get(key, 1, 5))) << key;
          EXPECT_EQ(std::isnan(got.dv.get(key, 0, 5)), in_key && key_reached[key]) << key;
        }
      }
    }
  }
}

// A NaN in the dout of one row reaches that row and the keys it sees.
TEST(BackwardNonfinite, DoutReachesWhatTheRowSees) {
  Strange s;
  std::vector<Options> kernels = cpu_kernels(DType::f32);
  kernels.push_back(reference_options());
  for (const Options& options : kernels) {
    SCOPED_TRACE(describe(options));
    Runner run(s.c.problem(), options);
    Chosen chosen(run.plan());
    Attention results = run.forward(s.data.inputs(), chosen);
    Array dout = s.dout;
    dout.set(90, 2, 4, NAN);
    const Slopes got = run.backward(s.data.inputs(), chosen, results, dout);
    for (std::int64_t token = 0; token < 200; ++token) {
      for (std::int64_t head = 0; head < 4; ++head) {
        EXPECT_EQ(std::isnan(got.dq.get(token, head, 0)), token == 90 && head == 2);
      }
      for (std::int64_t head = 0; head < 2; ++head) {
        const bool reached = head == 1 && sees(s.c, chosen, 90, 2, token);
        EXPECT_EQ(std::isnan(got.dk.get(token, head, 0)), reached) << token;
        EXPECT_EQ(std::isnan(got.dv.get(token, head, 4)), reached) << token;
        EXPECT_FALSE(std::isnan(got.dv.get(token, head, 0))) << token;
      }
    }
  }
}

// Scores of -inf have weight 0: such a key gives nothing and gets nothing, and a row of them only is one without keys.
TEST(BackwardNonfinite, ScoresOfMinusInfinity) {
  Case c{.q_heads = 1, .head_dim = 8, .q_lengths = {20}, .k_lengths = {20}, .config = {.block_size = 4, .top_k = 2}};
  Data data(c);
  for (std::int64_t i = 0; i < 20; ++i) data.q.set(i, 0, 0, 1.0f);
  data.k.set(0, 0, 0, -INFINITY);  // all that row 0 sees
  data.k.set(6, 0, 0, -INFINITY);
  Array dout = noise_dout(c);
  dout.set(0, 0, 3, INFINITY);
  std::vector<Options> kernels = cpu_kernels(DType::f32);
  kernels.push_back(reference_options());
  for (const Options& options : kernels) {
    SCOPED_TRACE(describe(options));
    Runner run(c.problem(), options);
    Chosen chosen = run.select(data.inputs());
    Attention results = run.attend(data.inputs(), chosen);
    const Slopes got = run.backward(data.inputs(), chosen, results, dout);
    EXPECT_TRUE(close(got, backward_f64(run, data.inputs(), &chosen, dout), Data(c), noise_dout(c), scale_of(c), 1e-5));
    for (std::int64_t x = 0; x < 8; ++x) {
      EXPECT_EQ(got.dq.get(0, 0, x), 0);
      for (const std::int64_t key : {0, 6}) {
        EXPECT_EQ(got.dk.get(key, 0, x), 0);
        EXPECT_EQ(got.dv.get(key, 0, x), 0);
      }
      for (std::int64_t i = 0; i < 20; ++i) EXPECT_TRUE(std::isfinite(got.dq.get(i, 0, x)));
    }
  }
}

// Block 0 has scores so low that its weights are 0: whatever a NaN or an overflow makes of the row, its keys get zeros.
TEST(BackwardNonfinite, WeightsOfZeroTakeNoPart) {
  for (const bool huge : {false, true}) {
    Case c{.q_heads = 1,
           .kv_heads = 1,
           .head_dim = 16,
           .q_lengths = {1},
           .k_lengths = {80},
           .config = {.block_size = 40, .top_k = 2, .scale = 1.0}};
    Data data(c);
    Array dout = noise_dout(c);
    for (std::int64_t x = 0; x < 16; ++x) {
      data.q.set(0, 0, x, 10.0f);
      if (huge) dout.set(0, 0, x, 1e20f);
      for (std::int64_t key = 0; key < 80; ++key) {
        data.k.set(key, 0, x, key < 40 ? -12.0f : 0.5f);
        if (huge && key < 40) data.v.set(key, 0, x, 1e20f);
      }
    }
    if (!huge) data.v.set(50, 0, 3, NAN);
    std::vector<Options> kernels = cpu_kernels(c.dtype);
    kernels.push_back(reference_options());
    for (const Options& options : kernels) {
      SCOPED_TRACE(::testing::Message() << describe(options) << (huge ? ", huge" : ", NaN"));
      Runner run(c.problem(), options);
      Chosen chosen(run.plan());
      Attention results = run.forward(data.inputs(), chosen);
      const Slopes got = run.backward(data.inputs(), chosen, results, dout);
      for (std::int64_t key = 0; key < 40; ++key) {
        EXPECT_EQ(got.dk.get(key, 0, 5), 0.0f) << key;
        EXPECT_EQ(got.dv.get(key, 0, 5), 0.0f) << key;
      }
      if (huge) {
        EXPECT_TRUE(std::isfinite(got.dq.get(0, 0, 5)));
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
