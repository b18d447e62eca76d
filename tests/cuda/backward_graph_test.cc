// forward and backward captured in graphs: what is played again, with other inputs in the same places, gives what calls
// give.
#include <cstring>

#include "cuda/launch.h"
#include "graph.h"
#include "resident.h"

namespace moba::test {
namespace {

// The same problem with other inputs, and, where it is packed, other lengths.
Given others_of(const Given& first) {
  Case c = first.c;
  c.seed = first.c.seed + 1;
  Given second(c);
  if (!second.data.cu_seqlens_q) return second;
  for (auto* table : {&*second.data.cu_seqlens_q, &*second.data.cu_seqlens_k}) table->as<std::int32_t>(4) += 7;
  return second;
}

void expect_training_replays(const ResidentTraining& resident, const Given& first, bool all_keys) {
  const cudaStream_t stream = test_stream();
  expect_replays(resident, first, others_of(first), stream, [&] { resident.run(all_keys, stream); });
}

class CudaBackwardGraphs : public CudaTest {};

// Nothing is loaded or allocated that a capture forbids. Means the most in a process of its own.
TEST_F(CudaBackwardGraphs, OfFirstCalls) {
  const Choice choice = small_choices().front();
  const cudaStream_t stream = test_stream();
  for (const std::string& family : families(choice.given.c.problem())) {
    for (const bool all_keys : {false, true}) {
      const ResidentTraining resident(choice, cuda_options(family));
      resident.upload(choice.given, stream);
      const Graph graph(stream, [&] { resident.run(all_keys, stream); });
      graph.launch(stream);
      const auto replayed = resident.results(stream);
      resident.upload(choice.given, stream);
      resident.run(all_keys, stream);
      EXPECT_TRUE(replayed == resident.results(stream)) << family;
    }
  }
}

TEST_F(CudaBackwardGraphs, GiveWhatCallsGive) {
  for (const Choice& choice : small_choices()) {
    const Given& given = choice.given;
    for (const std::string& family : families(given.c.problem())) {
      for (const bool all_keys : {false, true}) {
        SCOPED_TRACE(::testing::Message() << given.c << ", " << family << (all_keys ? ", all keys" : ""));
        expect_training_replays(ResidentTraining(choice, cuda_options(family)), given, all_keys);
      }
    }
  }
}

// Blocks of several parts, chosen at will and by many rows at once; one sequence, and several.
std::vector<Choice> choices_of_parts() {
  std::vector<Choice> all;
  for (const auto& [d, b] : {std::pair{64, 256}, {128, 512}, {96, 256}}) {
    for (const bool sink : {false, true}) all.push_back(long_choice(2000, d, b, sink));
    Case c = all.back().given.c;
    c.name = "packed";
    c.q_lengths = {1, 900, 0, 560, 40, 3, 400};
    c.k_lengths = {1, 1000, 5, 560, 40, 0, 400};
    c.rope = Rope{};
    all.push_back({Given(c), false});
  }
  return all;
}

// With the least memory that a plan takes there are several slabs of tokens, over which dk and dv are summed up, and in
// each of them several passes over parts; with a little more also lists that are cut, whose shares go into those sums.
TEST_F(CudaBackwardGraphs, OfPlansWithLittleMemory) {
  for (const Choice& choice : choices_of_parts()) {
    const Problem problem = choice.given.c.problem();
    for (const std::string& family : families(problem)) {
      for (const int hundredths : {0, 5}) {
        const std::size_t limit = training_limit(problem, family, hundredths);
        const ResidentTraining resident(choice, cuda_options(family, limit));
        SCOPED_TRACE(::testing::Message() << choice.given.c << ", " << resident.plan.kernels() << ", limit " << limit
                                          << (choice.sink ? ", sink" : ""));
        EXPECT_TRUE(has_slabs_and_passes(resident.plan));
        for (const bool all_keys : {false, true}) expect_training_replays(resident, choice.given, all_keys);
      }
    }
  }
}

// forward that keeps counts and marks offsets too, and backward that is given all of that.
TEST_F(CudaBackwardGraphs, OfWholeSelections) {
  std::vector<Choice> choices = small_choices();
  for (Choice& choice : choices_of_parts()) {
    if (!choice.sink) choices.push_back(std::move(choice));
  }
  for (const Choice& choice : choices) {
    const Problem problem = choice.given.c.problem();
    for (const std::string& family : families(problem)) {
      for (const std::size_t limit : {std::size_t{0}, training_limit(problem, family, 0)}) {
        const ResidentTraining resident(choice, cuda_options(family, limit), Keeps::all);
        SCOPED_TRACE(::testing::Message() << choice.given.c << ", " << resident.plan.kernels() << ", limit " << limit);
        expect_training_replays(resident, choice.given, false);
        std::int64_t mark = 0;
        std::memcpy(&mark, resident.offsets.bytes(test_stream()).data(), sizeof(mark));
        EXPECT_EQ(mark, -1) << "the transpose is out of date";
      }
    }
  }
}

}  // namespace
}  // namespace moba::test
