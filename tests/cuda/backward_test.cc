// backward, dense_backward and the forward that keeps its selection, of both kernel families: against float64 and the
// cpu backend, over the grid of problems and at random.
#include <algorithm>
#include <array>
#include <optional>

#include "cases.h"
#include "cuda/launch.h"
#include "fused_gradients.h"
#include "resident.h"

namespace moba::test {
namespace {

using GradientsOf = reference::GradientRows (*)(const Given&, const Trained&);

// A case with choices of anybody's, for each row and for the heads of each key head.
struct Expected {
  Given given;
  Chosen any, shared;

  explicit Expected(const Case& c)
      : given(c),
        any(Plan(c.problem(), reference_options()), Layout{.gap = 1}),
        shared(Plan(c.problem(), reference_options()), {}, true) {
    choose_anything(c, any, c.seed + 5);
    choose_anything(c, shared, c.seed + 5);
  }
};

// What is to be judged, once the device has made it.
struct Pending {
  const Given* given;
  std::string what;
  Trained trained;
};

// forward keeps the choice that it made: attention over that is what it gave.
void expect_kept(CudaRunner& run, const Given& given, Trained& trained) {
  Chosen& kept = *trained.chosen;
  EXPECT_TRUE(well_formed(given.c, kept));
  EXPECT_TRUE(kept.surroundings_untouched());
  EXPECT_EQ(kept.offsets.as<std::int64_t>(0), -1) << "the transpose is out of date";
  Inputs inputs = given.data.inputs();
  EXPECT_TRUE(run.forward(inputs).bits() == trained.results.bits()) << "keeping the choice changed the result";
  if (run.plan().forward_is_dense()) return;
  std::pair<Array, Array> rotated;
  if (given.c.rope) {
    rotated = run.rope(inputs);
    inputs.q = std::as_const(rotated.first).tensor();
    inputs.k = std::as_const(rotated.second).tensor();
  }
  EXPECT_TRUE(run.attend(inputs, kept).bits() == trained.results.bits()) << "forward attended to another choice";
}

void judge(const std::vector<Pending>& pending, GradientsOf gradients_of) {
  in_parallel(pending.size(), [&](std::size_t i) {
    const Pending& p = pending[i];
    EXPECT_TRUE(p.trained.results.surroundings_untouched()) << p.what;
    EXPECT_TRUE(near(*p.given, p.trained, gradients_of(*p.given, p.trained))) << p.what;
  });
}

// Every family on every case, over its own choice, over all keys and (without a rope) over anybody's choice.
void expect_all(const std::vector<Case>& cases, GradientsOf gradients_of) {
  constexpr std::size_t kAtOnce = 64;  // in memory
  for (std::size_t first = 0; first < cases.size(); first += kAtOnce) {
    std::vector<std::optional<Expected>> expected(std::min(kAtOnce, cases.size() - first));
    in_parallel(expected.size(), [&](std::size_t i) { expected[i].emplace(cases[first + i]); });
    std::vector<Pending> pending;
    for (const std::optional<Expected>& e : expected) {
      const Given& given = e->given;
      for (const std::string& family : families(given.c.problem())) {
        const std::string what = ::testing::PrintToString(given.c) + ", " + family;
        SCOPED_TRACE(what);
        CudaRunner run(given.c.problem(), cuda_options(family));
        Trained kept = train(run, given);
        expect_kept(run, given, kept);
        pending.push_back({&given, what + ", kept", std::move(kept)});
        pending.push_back({&given, what + ", dense", train_dense(run, given)});
        if (given.c.rope) continue;
        pending.push_back({&given, what + ", any", train_on(run, given, e->any)});
        pending.push_back({&given, what + ", shared", train_on(run, given, e->shared)});
      }
    }
    judge(pending, gradients_of);
  }
}

// The inputs of every run are new.
std::vector<Case> reseeded(std::vector<Case> cases) {
  for (Case& c : cases) c.seed += run_seed() * 1000;
  return cases;
}

class CudaBackward : public CudaTest {};

TEST_F(CudaBackward, Small) { expect_all(reseeded(small_cases()), f64_gradients); }

TEST_F(CudaBackward, Grid) { expect_all(reseeded(grid_cases()), cpu_gradients); }

TEST_F(CudaBackward, ManySequences) { expect_all({many_sequences()}, cpu_gradients); }

TEST_F(CudaBackward, RandomProblems) {
  std::vector<Case> cases;
  const auto count = static_cast<std::uint64_t>(random_cases(100));
  for (std::uint64_t i = 0; i < count; ++i) cases.push_back(random_case(run_seed() * 1000 + i));
  expect_all(cases, cpu_gradients);
}

TEST_F(CudaBackward, Large) {
  std::vector<Case> cases;
  for (const auto& [d, block_size, k] :
       {std::tuple{128, 128, 8}, {64, 64, 12}, {128, 512, 3}, {128, 16, 40}, {256, 128, 4}}) {
    Case c{.name = "large", .dtype = DType::bf16, .q_heads = 8, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
    c.q_lengths = c.k_lengths =
        cases.size() % 2 == 0 ? std::vector<std::int64_t>{3000} : std::vector<std::int64_t>{1000, 0, 1, 700, 1300};
    c.config = {.block_size = block_size, .top_k = k};
    cases.push_back(c);
  }
  for (const std::int64_t block_size : {1040, 8192}) {
    Case c{.name = "long blocks", .dtype = DType::bf16, .head_dim = 64, .q_lengths = {300}, .seed = run_seed()};
    c.k_lengths = {5 * block_size / 2};
    c.config = {.block_size = block_size, .top_k = 2};
    cases.push_back(c);
  }
  expect_all(cases, cpu_gradients);
}

// With a rope in the plan the gradients are those of the unrotated q and k.
class CudaBackwardRope : public CudaTest {
 protected:
  CudaBackwardRope() {
    cos_.fill(run_seed() + 1);
    sin_.fill(run_seed() + 2);
  }

  // One that rotates everything, the other way of pairing, part of a row, a scaling with a factor on all, and a table
  // that is no rotation.
  std::vector<Rope> ropes() const {
    Rope interleaved, partial, yarn, table;
    interleaved.style = RopeStyle::interleaved;
    interleaved.base = 500;
    partial.rotary_dim = 32;
    yarn.scaling = RopeScaling::yarn;
    yarn.factor = 4;
    yarn.original_max_position = 64;
    table.rotary_dim = 48;
    table.cos = cos_.tensor();
    table.sin = sin_.tensor();
    return {Rope{}, interleaved, partial, yarn, table};
  }

  void expect_ropes(const std::vector<std::int64_t>& head_dims, std::int64_t length) const {
    std::vector<Case> cases;
    for (const std::int64_t d : head_dims) {
      for (const Rope& rope : ropes()) {
        Case c{.name = "rope", .q_heads = 4, .kv_heads = 2, .head_dim = d, .seed = run_seed() + cases.size()};
        c.dtype = kTypes[cases.size() / 2 % 2];
        c.q_lengths = {length, 0, 31};
        c.k_lengths = {length + 20, 3, 31};
        c.config = {.block_size = 16, .top_k = 3, .causal = cases.size() % 3 != 0};
        c.outputs = {.gap = 8};
        c.rope = rope;
        cases.push_back(c);
        c.name = "rope, every block";
        c.config.block_size = 256;
        cases.push_back(c);
      }
    }
    expect_all(cases, f64_gradients);
  }

 private:
  Array cos_{DType::f32, {300, 24}, {.gap = 5}}, sin_{DType::f32, {300, 24}};
};

TEST_F(CudaBackwardRope, SmallOfEveryKind) { expect_ropes({64}, 40); }

TEST_F(CudaBackwardRope, OfEveryKind) { expect_ropes({64, 96, 128, 256}, 250); }

// Without offsets and rows, and with what they hold out of date, the same bits come.
TEST_F(CudaBackward, SmallTransposeMayBeLeftOut) {
  for (const std::int64_t d : {64, 128, 96}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {60, 39}};
    c.k_lengths = {75, 99};
    c.config = {.block_size = 16, .top_k = 3};
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      CudaRunner run(c.problem(), cuda_options(family));
      const Trained with = train(run, given);
      Chosen chosen(run.plan());
      chosen.offsets = chosen.rows = Array();
      Attention results = run.forward(given.data.inputs(), chosen);
      EXPECT_TRUE(results.bits() == with.results.bits());
      EXPECT_TRUE(chosen.ids.bits() == with.chosen->ids.bits());
      EXPECT_TRUE(chosen.counts.bits() == with.chosen->counts.bits());
      chosen.counts = Array();
      EXPECT_TRUE(run.backward(given.data.inputs(), chosen, results, given.dout).bits() == with.slopes.bits());
    }
  }
}

// Where there is nothing to choose: dense_backward without a selection, that of the ids with one.
TEST_F(CudaBackward, SmallEveryBlock) {
  for (const bool with_rope : {false, true}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 128, .q_lengths = {60, 39}};
    c.k_lengths = {75, 99};
    c.config = {.block_size = 32, .top_k = 4};
    if (with_rope) c.rope = Rope{};
    const Given given(c);
    const Inputs inputs = given.data.inputs();
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(family);
      CudaRunner run(c.problem(), cuda_options(family));
      ASSERT_TRUE(run.plan().forward_is_dense());
      const Trained all = train_dense(run, given);
      Chosen none(run.plan());
      none.ids = none.counts = none.offsets = none.rows = Array();
      Attention results = run.forward(inputs, none);
      EXPECT_TRUE(results.bits() == all.results.bits());
      EXPECT_TRUE(run.backward(inputs, none, results, given.dout).bits() == all.slopes.bits());

      Trained some{Chosen(run.plan()), all.results, all.slopes};  // other ids than forward would keep
      if (with_rope) continue;                                    // attend takes no rope
      choose_anything(c, *some.chosen, run_seed());
      some = train_on(run, given, *some.chosen);
      EXPECT_TRUE(near(given, some, f64_gradients(given, some)));
      EXPECT_FALSE(some.slopes.bits() == all.slopes.bits());
    }
  }
}

// From end to end, and from the same out and lse: each gradient of MoBA is no further from what it should be (by the
// cpu in float32, within 1e-5 of float64) than 1.5 times what those of full attention are.
TEST_F(CudaBackward, ErrorsAreThoseOfFullAttention) {
  std::vector<Case> cases;
  for (const auto& [d, block_size, k] : {std::tuple{128, 128, 4}, {64, 64, 3}, {96, 256, 3}}) {
    Case c{.name = "errors", .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
    c.q_lengths = c.k_lengths = d == 64 ? std::vector<std::int64_t>{1500, 1, 700} : std::vector<std::int64_t>{2048};
    c.config = {.block_size = block_size, .top_k = k, .causal = d != 96};
    cases.push_back(c);
  }
  for (const Case& c : cases) {
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      CudaRunner run(c.problem(), cuda_options(family));
      const std::array<Trained, 2> trained{train(run, given), train_dense(run, given)};
      std::array<TensorErrors, 4> errors;  // of MoBA and dense from their out and lse, then from end to end
      in_parallel(4, [&](std::size_t i) {
        const Trained& one = trained[i % 2];
        CpuJudge judge(c, given.data, one.chosen ? &*one.chosen : nullptr);
        const Slopes slopes = judge.gradients(given.dout, i < 2 ? &one.results : nullptr);
        errors[i] = tensor_errors(one.slopes, {slopes.dq.numbers(), slopes.dk.numbers(), slopes.dv.numbers()});
      });
      for (const std::size_t i : {0, 2}) {
        const char* const how = i == 0 ? "same out and lse" : "end to end";
        const auto compare = [&](const char* name, double moba, double dense) {
          std::printf("%s %s, %s, %s: error %.2e, of dense %.2e\n", ::testing::PrintToString(c).c_str(), family.c_str(),
                      how, name, moba, dense);
          EXPECT_LE(moba, 1.5 * dense) << name << ", " << how;
        };
        compare("dq", errors[i].dq, errors[i + 1].dq);
        compare("dk", errors[i].dk, errors[i + 1].dk);
        compare("dv", errors[i].dv, errors[i + 1].dv);
      }
    }
  }
}

// More units than multiprocessors, of a tile or two, with all keys of a block and with few.
TEST_F(CudaBackward, SmallManyUnits) {
  std::vector<Case> cases;
  for (const auto& [d, block_size] : {std::pair{64, 64}, {128, 64}, {128, 128}}) {
    Case c{.name = "many units", .dtype = DType::bf16, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
    c.q_lengths = c.k_lengths = std::vector<std::int64_t>(80, 2 * block_size + 2);
    c.config = {.block_size = block_size, .top_k = 2};
    cases.push_back(c);
  }
  expect_all(cases, f64_gradients);
}

TEST_F(CudaBackward, SmallGradientsBetweenOneAnother) {
  for (const std::int64_t d : {64, 128, 96}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {200}, .k_lengths = {200}};
    c.config = {.block_size = d == 64 ? 144 : 16, .top_k = 3};
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      CudaRunner run(c.problem(), cuda_options(family));
      const Trained expected = train(run, given);
      const ResidentTraining resident({given, false}, cuda_options(family));
      const cudaStream_t stream = test_stream();
      resident.upload(given, stream);
      resident.run(false, stream);
      for (const bool in_turn : {false, true}) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family << (in_turn ? ", dk and dv in turn" : ""));
        const FusedGradients fused(in_turn);
        Array all(c.dtype, {c.total_q(), FusedGradients::kHeads, d});
        const DeviceTensor device(all.tensor());
        device.upload(all.tensor().data, stream);
        resident.backward_pass(false, resident.selection(), {resident.out.tensor(), resident.lse.tensor()},
                               fused.of(device.tensor()), resident.workspace.bytes(), stream);
        device.download(all.tensor().data, stream);
        MOBA_CUDA(cudaStreamSynchronize(stream));
        EXPECT_TRUE(fused.hold(expected.slopes, all));
        EXPECT_TRUE(device.guards_untouched());
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
