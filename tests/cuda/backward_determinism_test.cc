// backward: the same bits run after run, on any stream, beside other calls and from a graph; and as near to float64 as
// ever, whatever memory a plan may take.
#include <algorithm>
#include <memory>
#include <thread>

#include "cases.h"
#include "cuda/launch.h"
#include "graph.h"
#include "training.h"

namespace moba::test {
namespace {

using Bits = std::vector<std::uint64_t>;
using Bytes = std::vector<std::byte>;

// A case and what its rows attend to: what the gate chooses, or block 0 and their own, which makes one list as long as
// all others together.
struct Choice {
  Given given;
  bool sink;

  std::optional<Chosen> chosen() const {
    if (!sink) return std::nullopt;
    Chosen made(Plan(given.c.problem(), reference_options()), Layout{.gap = 1}, true);
    for (std::int64_t token = 0; token < made.ids.dim(0); ++token) {
      const auto own = static_cast<std::int32_t>(token / given.c.config.block_size);
      for (std::int64_t head = 0; head < made.ids.dim(1); ++head) {
        made.set_row(token, head, own == 0 ? std::vector<std::int32_t>{0} : std::vector<std::int32_t>{0, own});
      }
    }
    return made;
  }
};

// Sequences of many lengths, causal with a rope and neither, for the blocks that the kernels tell apart.
std::vector<Choice> small_choices() {
  std::vector<Choice> all;
  for (const auto& [d, b] : {std::pair{64, 32}, {128, 128}, {128, 144}, {96, 48}}) {
    for (const bool causal : {true, false}) {
      Case c{.name = "trained", .dtype = causal ? DType::bf16 : DType::f16, .q_heads = 6, .kv_heads = 3, .head_dim = d};
      c.q_lengths = {1, 600, 0, 90, 200, 3, 400};
      c.k_lengths = {1, 700, 5, 70, 200, 0, 400};
      c.config = {.block_size = b, .top_k = 4, .causal = causal};
      if (causal) c.rope = Rope{};
      c.seed = run_seed();
      all.push_back({Given(c), false});
    }
  }
  return all;
}

Choice long_choice(std::int64_t tokens, std::int64_t d, std::int64_t block_size, bool sink) {
  Case c{.name = "long", .dtype = DType::bf16, .q_heads = 8, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
  c.q_lengths = c.k_lengths = {tokens};
  c.config = {.block_size = block_size, .top_k = 3};
  return {Given(c), sink};
}

std::vector<Choice> long_choices() {
  std::vector<Choice> all;
  for (const auto& [d, b] : {std::pair{64, 64}, {128, 128}, {128, 512}, {96, 128}}) {
    for (const bool sink : {false, true}) all.push_back(long_choice(2000, d, b, sink));
  }
  return all;
}

Trained train(CudaRunner& run, const Choice& choice) {
  const std::optional<Chosen> chosen = choice.chosen();
  return chosen ? train_on(run, choice.given, *chosen) : train(run, choice.given);
}

std::vector<Bits> bits(const Trained& trained) { return {trained.results.bits(), trained.slopes.bits()}; }

// The elements of a tensor without gaps.
Bytes bytes_of(const Array& x) {
  const ConstTensor t = x.tensor();
  std::size_t size = size_in_bytes(t.dtype);
  for (int i = 0; i < t.rank; ++i) size *= static_cast<std::size_t>(t.shape[i]);
  const auto* const first = static_cast<const std::byte*>(t.data);
  return {first, first + size};
}

// The tensors of forward, backward, dense and dense_backward on the device, where they stay from call to call.
struct Resident {
  Plan plan;
  Attention result;
  const std::optional<Chosen> given_choice;  // none: forward's
  Chosen chosen;
  Slopes slopes;
  const Attention no_result;
  const Slopes no_slopes;
  DeviceTensor q, k, v;
  std::optional<DeviceTensor> cu_seqlens_q, cu_seqlens_k;
  DeviceTensor dout, out, lse, ids, dq, dk, dv;
  DeviceMemory workspace;

  Resident(const Given& given, const std::string& family, const std::optional<Chosen>& choice = std::nullopt)
      : plan(given.c.problem(), cuda_options(family)),
        result(plan.problem()),
        given_choice(choice),
        chosen(choice ? *choice : Chosen(plan)),
        slopes(plan.problem()),
        no_result(plan.problem()),
        no_slopes(plan.problem()),
        q(given.data.q.tensor()),
        k(given.data.k.tensor()),
        v(given.data.v.tensor()),
        dout(given.dout.tensor()),
        out(result.out.tensor()),
        lse(result.lse.tensor()),
        ids(chosen.ids.tensor()),
        dq(slopes.dq.tensor()),
        dk(slopes.dk.tensor()),
        dv(slopes.dv.tensor()),
        workspace(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes())) {
    if (!given.data.cu_seqlens_q) return;
    cu_seqlens_q.emplace(given.data.cu_seqlens_q->tensor());
    cu_seqlens_k.emplace(given.data.cu_seqlens_k->tensor());
  }

  void upload(const Given& given, cudaStream_t stream) const {
    const Data& data = given.data;
    q.upload(data.q.tensor().data, stream);
    k.upload(data.k.tensor().data, stream);
    v.upload(data.v.tensor().data, stream);
    if (cu_seqlens_q) cu_seqlens_q->upload(data.cu_seqlens_q->tensor().data, stream);
    if (cu_seqlens_k) cu_seqlens_k->upload(data.cu_seqlens_k->tensor().data, stream);
    dout.upload(given.dout.tensor().data, stream);
    if (given_choice) ids.upload(given_choice->ids.tensor().data, stream);
    forget(stream);
  }

  // Outputs without results.
  void forget(cudaStream_t stream) const {
    out.upload(no_result.out.tensor().data, stream);
    lse.upload(no_result.lse.tensor().data, stream);
    dq.upload(no_slopes.dq.tensor().data, stream);
    dk.upload(no_slopes.dk.tensor().data, stream);
    dv.upload(no_slopes.dv.tensor().data, stream);
    workspace.poison(stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
  }

  // Over what forward chooses, or over all keys.
  void run(bool all_keys, cudaStream_t stream) const {
    Inputs inputs{q.tensor(), k.tensor(), v.tensor(), {}, {}};
    if (cu_seqlens_q) inputs.cu_seqlens_q = cu_seqlens_q->tensor(), inputs.cu_seqlens_k = cu_seqlens_k->tensor();
    const Outputs outputs{out.tensor(), lse.tensor()};
    const ConstOutputs results{outputs.out, outputs.lse};
    const Gradients gradients{dq.tensor(), dk.tensor(), dv.tensor()};
    if (all_keys) {
      dense(plan, inputs, outputs, workspace.bytes(), {stream});
      dense_backward(plan, inputs, results, dout.tensor(), gradients, workspace.bytes(), {stream});
    } else {
      const Selection selection{ids.tensor(), {}, {}, {}};
      if (given_choice) {
        attend(plan, inputs, selection, outputs, workspace.bytes(), {stream});
      } else {
        forward(plan, inputs, selection, outputs, workspace.bytes(), {stream});
      }
      backward(plan, inputs, selection, results, dout.tensor(), gradients, workspace.bytes(), {stream});
    }
  }

  std::vector<Bytes> results(cudaStream_t stream) {
    out.download(result.out.tensor().data, stream);
    lse.download(result.lse.tensor().data, stream);
    dq.download(slopes.dq.tensor().data, stream);
    dk.download(slopes.dk.tensor().data, stream);
    dv.download(slopes.dv.tensor().data, stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
    return {bytes_of(result.out), bytes_of(result.lse), bytes_of(slopes.dq), bytes_of(slopes.dk), bytes_of(slopes.dv)};
  }
};

void expect_thirty_the_same(const Choice& choice) {
  const Given& given = choice.given;
  const cudaStream_t stream = test_stream();
  for (const std::string& family : families(given.c.problem())) {
    Resident resident(given, family, choice.chosen()), another(given, family, choice.chosen());
    resident.upload(given, stream);
    another.upload(given, stream);
    for (const bool all_keys : {false, true}) {
      SCOPED_TRACE(::testing::Message() << given.c << ", " << family << (choice.sink ? ", sink" : "")
                                        << (all_keys ? ", all keys" : ""));
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
  // What forward can do with may be too little for backward, which then says what it needs.
  const CudaRunner smallest(problem, cuda_options(family, least_workspace(problem, family)));
  const std::size_t least = std::max(smallest.plan().workspace_bytes(), smallest.plan().backward_workspace_bytes());
  const std::size_t most = most_workspace(problem, family);
  ASSERT_GT(least, 0u);
  ASSERT_LT(least, most);
  std::vector<Trained> got;  // by limit, two each
  std::vector<std::string> plans;
  for (const int part : {0, 1, 5, 20, 50, 90}) {
    const std::size_t limit = least + (most - least) / 100 * static_cast<std::size_t>(part);
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
  expect_any_memory(
      {long_choice(4000, 64, 64, true), long_choice(4000, 128, 128, true), long_choice(4000, 96, 256, true)});
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

// Nothing is loaded or allocated that a capture forbids. Means the most in a process of its own.
TEST_F(CudaBackwardDeterminism, GraphsOfFirstCalls) {
  const Given given = small_choices().front().given;
  const cudaStream_t stream = test_stream();
  for (const std::string& family : families(given.c.problem())) {
    for (const bool all_keys : {false, true}) {
      Resident resident(given, family);
      resident.upload(given, stream);
      const Graph graph(stream, [&] { resident.run(all_keys, stream); });
      graph.launch(stream);
      const auto replayed = resident.results(stream);
      resident.upload(given, stream);
      resident.run(all_keys, stream);
      EXPECT_TRUE(replayed == resident.results(stream)) << family;
    }
  }
}

// A captured pass is played with other inputs, and other lengths, in the same places.
TEST_F(CudaBackwardDeterminism, GraphsGiveWhatCallsGive) {
  for (const Choice& choice : small_choices()) {
    const Given& first = choice.given;
    Case other = first.c;
    other.seed = first.c.seed + 1;
    Given second(other);
    for (auto* table : {&*second.data.cu_seqlens_q, &*second.data.cu_seqlens_k}) table->as<std::int32_t>(4) += 7;
    const cudaStream_t stream = test_stream();
    for (const std::string& family : families(first.c.problem())) {
      for (const bool all_keys : {false, true}) {
        SCOPED_TRACE(::testing::Message() << first.c << ", " << family << (all_keys ? ", all keys" : ""));
        Resident resident(first, family);
        std::vector<std::vector<Bytes>> direct;
        for (const Given* given : {&first, static_cast<const Given*>(&second)}) {
          resident.upload(*given, stream);
          resident.run(all_keys, stream);
          direct.push_back(resident.results(stream));
        }
        EXPECT_FALSE(direct[0] == direct[1]);
        const Graph graph(stream, [&] { resident.run(all_keys, stream); });
        for (int i = 0; i < 6; ++i) {
          resident.upload(i % 2 == 0 ? first : second, stream);
          graph.launch(stream);
          EXPECT_TRUE(resident.results(stream) == direct[i % 2]) << "replay " << i;
        }
      }
    }
  }
}

// Two streams at once, from as many threads, with the same problem and with another; then the default stream.
TEST_F(CudaBackwardDeterminism, CallsMayRunSideBySide) {
  const std::vector<Choice> choices = small_choices();
  for (std::size_t n = 0; n < choices.size(); ++n) {
    const Given* const both[] = {&choices[n].given, &choices[n % 2 == 0 ? n : (n + 1) % choices.size()].given};
    for (const std::string& family : families(both[0]->c.problem())) {
      SCOPED_TRACE(::testing::Message() << both[0]->c << ", " << family);
      std::vector<std::unique_ptr<Resident>> residents;
      std::vector<std::vector<Bytes>> expected;
      cudaStream_t streams[2];
      for (const int i : {0, 1}) {
        MOBA_CUDA(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
        const bool fits = families(both[i]->c.problem()).size() > 1;
        residents.push_back(std::make_unique<Resident>(*both[i], fits ? family : "portable"));
        residents[i]->upload(*both[i], streams[i]);
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
      residents[0]->upload(*both[0], nullptr);
      residents[0]->run(false, nullptr);
      EXPECT_TRUE(residents[0]->results(nullptr) == expected[0]) << "default stream";
    }
  }
}

}  // namespace
}  // namespace moba::test
