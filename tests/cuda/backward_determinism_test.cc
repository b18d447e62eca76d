// backward: the same bits run after run, on any stream and beside other calls; and as near to float64 as ever, whatever
// memory a plan may take.
#include <algorithm>
#include <memory>
#include <thread>

#include "cuda/launch.h"
#include "resident.h"

namespace moba::test {
namespace {

using Bits = std::vector<std::uint64_t>;

std::vector<Choice> long_choices() {
  std::vector<Choice> all;
  for (const auto& [d, b] : {std::pair{64, 64}, {128, 64}, {128, 128}, {128, 512}, {96, 128}}) {
    for (const bool sink : {false, true}) all.push_back(long_choice(2000, d, b, sink));
  }
  return all;
}

Trained train(CudaRunner& run, const Choice& choice) {
  const std::optional<Chosen> chosen = choice.chosen();
  return chosen ? train_on(run, choice.given, *chosen) : train(run, choice.given);
}

std::vector<Bits> bits(const Trained& trained) { return {trained.results.bits(), trained.slopes.bits()}; }

void expect_thirty_the_same(const Choice& choice) {
  const Given& given = choice.given;
  const cudaStream_t stream = test_stream();
  for (const std::string& family : families(given.c.problem())) {
    const ResidentTraining resident(choice, cuda_options(family)), another(choice, cuda_options(family));
    resident.upload(given, stream);
    another.upload(given, stream);
    for (const bool all_keys : {false, true}) {
      SCOPED_TRACE(::testing::Message() << given.c << ", " << family << (choice.sink ? ", sink" : "")
                                        << (all_keys ? ", all keys" : ""));
      for (const ResidentTraining* const each : {&resident, &another}) each->forget(stream);
      resident.run(all_keys, stream);
      const auto expected = resident.results(stream);
      for (int i = 0; i < 30; ++i) {
        resident.forget(stream);
        resident.run(all_keys, stream);
        ASSERT_TRUE(resident.results(stream) == expected) << "run " << i;
      }
      another.run(all_keys, stream);
      EXPECT_TRUE(another.results(stream) == expected) << "another plan";
    }
  }
}

class CudaBackwardDeterminism : public CudaTest {};

TEST_F(CudaBackwardDeterminism, ThirtyRunsGiveTheSameBits) {
  for (const Choice& choice : small_choices()) expect_thirty_the_same(choice);
}

TEST_F(CudaBackwardDeterminism, ThirtyLongRunsGiveTheSameBits) {
  for (const Choice& choice : long_choices()) expect_thirty_the_same(choice);
}

TEST_F(CudaBackwardDeterminism, SmallRunsAgain) {
  for (const std::int64_t d : {64, 128, 32}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {60, 39}};
    c.k_lengths = {75, 99};
    c.config = {.block_size = 16, .top_k = 3};
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      CudaRunner run(c.problem(), cuda_options(family)), another(c.problem(), cuda_options(family));
      const auto expected = bits(train(run, given)), dense = bits(train_dense(run, given));
      for (CudaRunner* const again : {&run, &another}) {
        EXPECT_TRUE(bits(train(*again, given)) == expected) << "backward";
        EXPECT_TRUE(bits(train_dense(*again, given)) == dense) << "dense_backward";
      }
    }
  }
}

// Several slabs and passes, in memory that holds no more than them.
TEST_F(CudaBackwardDeterminism, SmallRunsWithLittleMemory) {
  for (const std::int64_t d : {64, 128, 96}) {
    Case c{.dtype = DType::bf16, .q_heads = 6, .kv_heads = 2, .head_dim = d, .q_lengths = {300, 40}};
    c.k_lengths = {300, 40};
    c.config = {.block_size = 144, .top_k = 2};
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      CudaRunner run(c.problem(), cuda_options(family, training_limit(c.problem(), family, 0)));
      SCOPED_TRACE(::testing::Message() << c << ", " << run.plan().kernels());
      EXPECT_TRUE(has_slabs_and_passes(run.plan()));
      for (const bool all_keys : {false, true}) {
        const auto once = [&] { return all_keys ? train_dense(run, given) : train(run, given); };
        const Trained trained = once();
        EXPECT_TRUE(near(given, trained, f64_gradients(given, trained))) << (all_keys ? "all keys" : "");
        EXPECT_TRUE(bits(once()) == bits(trained)) << (all_keys ? "all keys" : "");
      }
    }
  }
}

reference::GradientRows judged(const Given& given, const Trained& trained) {
  return given.c.rope ? f64_gradients(given, trained) : cpu_gradients(given, trained);
}

// The gradients of what `trained` chose and computed, by another plan.
Trained backward_again(CudaRunner& run, const Given& given, Trained trained) {
  const Inputs inputs = given.data.inputs();
  trained.slopes = trained.chosen ? run.backward(inputs, *trained.chosen, trained.results, given.dout, given.c.outputs)
                                  : run.dense_backward(inputs, trained.results, given.dout, given.c.outputs);
  return trained;
}

// A choice, what one kernel family made of it (over the choice; over all keys), and the gradients of that.
struct Whole {
  const Choice& choice;
  CudaRunner run;
  Trained trained[2];
  reference::GradientRows expected[2];

  explicit Whole(const Choice& made)
      : choice(made), run(made.given.c.problem()), trained{train(run, made), train_dense(run, made.given)} {}
};

// Slabs of some heads, of one, of parts of the tokens; passes of parts of the keys of every block. The bits are those
// of the plan.
void expect_any_memory(const Whole& whole, const std::string& family) {
  const Given& given = whole.choice.given;
  const Problem problem = given.c.problem();
  SCOPED_TRACE(::testing::Message() << given.c << ", " << family << (whole.choice.sink ? ", sink" : ""));
  const std::size_t most = most_workspace(problem, family);
  ASSERT_LT(training_limit(problem, family, 0), most);
  std::vector<Trained> got;  // by limit, two each
  std::vector<std::string> plans;
  for (const int part : {0, 1, 5, 20, 50, 90}) {
    const std::size_t limit = training_limit(problem, family, part);
    CudaRunner little(problem, cuda_options(family, limit));
    plans.push_back("limit " + std::to_string(limit) + " of " + std::to_string(most) + ": " + little.plan().kernels());
    EXPECT_LE(little.plan().backward_workspace_bytes(), limit) << plans.back();
    for (const Trained& trained : whole.trained) {
      got.push_back(backward_again(little, given, trained));
      if (part % 20 != 0) continue;
      EXPECT_TRUE(backward_again(little, given, trained).slopes.bits() == got.back().slopes.bits()) << plans.back();
    }
  }
  std::vector<::testing::AssertionResult> verdicts(got.size(), ::testing::AssertionSuccess());
  in_parallel(got.size(), [&](std::size_t i) { verdicts[i] = near(given, got[i], whole.expected[i % 2]); });
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(verdicts[i]) << (i % 2 == 0 ? "backward, " : "dense_backward, ") << plans[i / 2];
  }
}

void expect_any_memory(const std::vector<Choice>& choices) {
  std::vector<std::unique_ptr<Whole>> wholes;
  wholes.reserve(choices.size());
  for (const Choice& choice : choices) wholes.push_back(std::make_unique<Whole>(choice));
  in_parallel(2 * wholes.size(), [&](std::size_t i) {
    Whole& whole = *wholes[i / 2];
    whole.expected[i % 2] = judged(whole.choice.given, whole.trained[i % 2]);
  });
  for (const auto& whole : wholes) {
    for (const std::string& family : families(whole->choice.given.c.problem())) expect_any_memory(*whole, family);
  }
}

TEST_F(CudaBackwardDeterminism, AnyMemoryWillDo) { expect_any_memory(small_choices()); }

TEST_F(CudaBackwardDeterminism, AnyMemoryWillDoForLongLists) {
  expect_any_memory({long_choice(4000, 64, 64, true), long_choice(4000, 128, 64, true),
                     long_choice(4000, 128, 128, true), long_choice(4000, 96, 256, true)});
}

// Blocks of more keys than one pass takes where memory is short.
TEST_F(CudaBackwardDeterminism, AnyMemoryWillDoForLongBlocks) {
  std::vector<Choice> choices;
  for (const std::int64_t d : {64, 128, 96}) {
    Case c{.name = "long blocks", .dtype = DType::bf16, .head_dim = d, .q_lengths = {300, 40}, .seed = run_seed()};
    c.k_lengths = {5 * 8192 / 2, 8192 + 3};
    c.config = {.block_size = 8192, .top_k = 2, .causal = d != 128};
    choices.push_back({Given(c), false});
  }
  expect_any_memory(choices);
}

// Two streams at once, from as many threads, with the same problem and with another; then the default stream.
TEST_F(CudaBackwardDeterminism, CallsMayRunSideBySide) {
  const std::vector<Choice> choices = small_choices();
  for (std::size_t n = 0; n < choices.size(); ++n) {
    const Choice* const both[] = {&choices[n], &choices[n % 2 == 0 ? n : (n + 1) % choices.size()]};
    for (const std::string& family : families(both[0]->given.c.problem())) {
      SCOPED_TRACE(::testing::Message() << both[0]->given.c << ", " << family);
      std::vector<std::unique_ptr<ResidentTraining>> residents;
      std::vector<std::vector<Bytes>> expected;
      cudaStream_t streams[2];
      for (const int i : {0, 1}) {
        MOBA_CUDA(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
        const bool fits = families(both[i]->given.c.problem()).size() > 1;
        residents.push_back(std::make_unique<ResidentTraining>(*both[i], cuda_options(fits ? family : "portable")));
        residents[i]->upload(both[i]->given, streams[i]);
        residents[i]->run(false, streams[i]);
        expected.push_back(residents[i]->results(streams[i]));
      }
      std::vector<std::thread> callers;
      for (const int i : {0, 1}) {
        callers.emplace_back([&, i] {
          MOBA_CUDA(cudaSetDevice(device().index));
          for (int repeat = 0; repeat < 10; ++repeat) residents[i]->run(false, streams[i]);
        });
      }
      for (std::thread& caller : callers) caller.join();
      for (const int i : {0, 1}) {
        EXPECT_TRUE(residents[i]->results(streams[i]) == expected[i]) << "stream " << i;
        MOBA_CUDA(cudaStreamDestroy(streams[i]));
      }
      residents[0]->upload(both[0]->given, nullptr);
      residents[0]->run(false, nullptr);
      EXPECT_TRUE(residents[0]->results(nullptr) == expected[0]) << "default stream";
    }
  }
}

}  // namespace
}  // namespace moba::test
