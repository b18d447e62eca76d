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

// All that a pass made, as bits.
std::vector<Bits> bits(const Trained& trained) {
  std::vector<Bits> all{trained.results.bits(), trained.slopes.bits()};
  if (trained.chosen) all.push_back(trained.chosen->ids.bits());
  return all;
}

void expect_the_same_again(const Choice& choice, int runs) {
  const Problem problem = choice.given.c.problem();
  for (const std::string& family : families(problem)) {
    SCOPED_TRACE(::testing::Message() << choice.given.c << ", " << family << (choice.sink ? ", sink" : ""));
    CudaRunner run(problem, cuda_options(family));
    const auto expected = bits(train(run, choice)), dense = bits(train_dense(run, choice.given));
    for (int i = 0; i < runs; ++i) {
      ASSERT_TRUE(bits(train(run, choice)) == expected) << "backward, run " << i;
      ASSERT_TRUE(bits(train_dense(run, choice.given)) == dense) << "dense_backward, run " << i;
    }
    CudaRunner another(problem, cuda_options(family));
    EXPECT_TRUE(bits(train(another, choice)) == expected) << "another plan";
  }
}

class CudaBackwardDeterminism : public CudaTest {};

TEST_F(CudaBackwardDeterminism, ThirtyRunsGiveTheSameBits) {
  for (const Choice& choice : small_choices()) expect_the_same_again(choice, 30);
}

TEST_F(CudaBackwardDeterminism, ThirtyLongRunsGiveTheSameBits) {
  for (const Choice& choice : long_choices()) expect_the_same_again(choice, 30);
}

TEST_F(CudaBackwardDeterminism, SmallRunsAgain) {
  for (const std::int64_t d : {64, 128, 32}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {60, 39}};
    c.k_lengths = {75, 99};
    c.config = {.block_size = 16, .top_k = 3};
    expect_the_same_again({Given(c), false}, 2);
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

// Slabs of some heads, of one, of parts of the tokens; passes of parts of the keys of every block. The bits are those
// of the plan.
void expect_any_memory(const Choice& choice) {
  const Given& given = choice.given;
  const Problem problem = given.c.problem();
  for (const std::string& family : families(problem)) {
    SCOPED_TRACE(::testing::Message() << given.c << ", " << family << (choice.sink ? ", sink" : ""));
    CudaRunner run(problem, cuda_options(family));
    const Trained whole[] = {train(run, choice), train_dense(run, given)};
    reference::GradientRows expected[2];
    in_parallel(2, [&](std::size_t i) { expected[i] = judged(given, whole[i]); });
    const std::size_t least = least_workspace(problem, family), most = most_workspace(problem, family);
    ASSERT_GT(least, 0u);
    ASSERT_LT(least, most);
    for (const int part : {0, 1, 5, 20, 50, 90}) {
      const std::size_t limit = least + (most - least) / 100 * static_cast<std::size_t>(part);
      CudaRunner little(problem, cuda_options(family, limit));
      SCOPED_TRACE(::testing::Message() << "limit " << limit << " of " << most << ": " << little.plan().kernels());
      EXPECT_LE(little.plan().backward_workspace_bytes(), limit);
      for (const int i : {0, 1}) {
        const Trained got = backward_again(little, given, whole[i]);
        EXPECT_TRUE(near(given, got, expected[i])) << (i == 0 ? "backward" : "dense_backward");
        EXPECT_TRUE(backward_again(little, given, whole[i]).slopes.bits() == got.slopes.bits());
      }
    }
  }
}

TEST_F(CudaBackwardDeterminism, AnyMemoryWillDo) {
  for (const Choice& choice : small_choices()) expect_any_memory(choice);
}

TEST_F(CudaBackwardDeterminism, AnyMemoryWillDoForLongLists) {
  for (const auto& [d, b] : {std::pair{64, 64}, {128, 128}, {96, 256}})
    expect_any_memory(long_choice(6000, d, b, true));
}

// Blocks of more keys than one pass takes where memory is short.
TEST_F(CudaBackwardDeterminism, AnyMemoryWillDoForLongBlocks) {
  for (const std::int64_t d : {64, 128, 96}) {
    Case c{.name = "long blocks", .dtype = DType::bf16, .head_dim = d, .q_lengths = {300, 40}, .seed = run_seed()};
    c.k_lengths = {5 * 8192 / 2, 8192 + 3};
    c.config = {.block_size = 8192, .top_k = 2, .causal = d != 128};
    expect_any_memory({Given(c), false});
  }
}

// The tensors of forward, backward, dense and dense_backward on the device, where they stay from call to call.
struct Resident {
  Plan plan;
  Attention result;
  Chosen chosen;
  Slopes slopes;
  DeviceTensor q, k, v, cu_seqlens_q, cu_seqlens_k, dout, out, lse, ids, dq, dk, dv;
  DeviceMemory workspace;

  Resident(const Given& given, const std::string& family)
      : plan(given.c.problem(), cuda_options(family)),
        result(plan.problem()),
        chosen(plan),
        slopes(plan.problem()),
        q(given.data.q.tensor()),
        k(given.data.k.tensor()),
        v(given.data.v.tensor()),
        cu_seqlens_q(given.data.cu_seqlens_q->tensor()),
        cu_seqlens_k(given.data.cu_seqlens_k->tensor()),
        dout(given.dout.tensor()),
        out(result.out.tensor()),
        lse(result.lse.tensor()),
        ids(chosen.ids.tensor()),
        dq(slopes.dq.tensor()),
        dk(slopes.dk.tensor()),
        dv(slopes.dv.tensor()),
        workspace(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes())) {}

  void upload(const Given& given, cudaStream_t stream) const {
    const Data& data = given.data;
    q.upload(data.q.tensor().data, stream);
    k.upload(data.k.tensor().data, stream);
    v.upload(data.v.tensor().data, stream);
    cu_seqlens_q.upload(data.cu_seqlens_q->tensor().data, stream);
    cu_seqlens_k.upload(data.cu_seqlens_k->tensor().data, stream);
    dout.upload(given.dout.tensor().data, stream);
    // Outputs without results.
    const Attention no_result(plan.problem());
    const Slopes no_slopes(plan.problem());
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
    const Inputs inputs{q.tensor(), k.tensor(), v.tensor(), cu_seqlens_q.tensor(), cu_seqlens_k.tensor()};
    const Outputs outputs{out.tensor(), lse.tensor()};
    const ConstOutputs results{outputs.out, outputs.lse};
    const Gradients gradients{dq.tensor(), dk.tensor(), dv.tensor()};
    if (all_keys) {
      dense(plan, inputs, outputs, workspace.bytes(), {stream});
      dense_backward(plan, inputs, results, dout.tensor(), gradients, workspace.bytes(), {stream});
    } else {
      const Selection selection{ids.tensor(), {}, {}, {}};
      forward(plan, inputs, selection, outputs, workspace.bytes(), {stream});
      backward(plan, inputs, selection, results, dout.tensor(), gradients, workspace.bytes(), {stream});
    }
  }

  std::vector<Bits> results(cudaStream_t stream) {
    out.download(result.out.tensor().data, stream);
    lse.download(result.lse.tensor().data, stream);
    dq.download(slopes.dq.tensor().data, stream);
    dk.download(slopes.dk.tensor().data, stream);
    dv.download(slopes.dv.tensor().data, stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
    return {result.bits(), slopes.bits()};
  }
};

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
        std::vector<std::vector<Bits>> direct;
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
      std::vector<std::vector<Bits>> expected;
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
