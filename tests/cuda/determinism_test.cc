// The same bits run after run, whatever memory a plan may take, on any stream, beside other calls, and from a graph.
#include <memory>
#include <thread>

#include "cases.h"
#include "cuda/launch.h"
#include "cuda_test.h"
#include "graph.h"

namespace moba::test {
namespace {

using Bits = std::vector<std::uint64_t>;

// Everything that the backend can compute for a case, as bits.
std::vector<std::pair<std::string, Bits>> everything(const Case& c, const Data& data, const Options& options) {
  std::vector<std::pair<std::string, Bits>> results;
  CudaRunner run(c.problem(), options);
  Inputs inputs = data.inputs();
  results.emplace_back("forward", run.forward(inputs).bits());
  results.emplace_back("dense", run.dense(inputs).bits());
  std::pair<Array, Array> rotated;
  if (c.rope) {
    rotated = run.rope(inputs);
    results.emplace_back("rotated q", rotated.first.bits());
    results.emplace_back("rotated k", rotated.second.bits());
    inputs.q = std::as_const(rotated.first).tensor();
    inputs.k = std::as_const(rotated.second).tensor();
  }
  const Array centroids = run.pool(inputs);
  results.emplace_back("centroids", centroids.bits());
  Chosen gated = run.gate(inputs, centroids);
  results.emplace_back("ids", gated.ids.bits());
  run.index(inputs, gated);
  results.emplace_back("offsets", gated.offsets.bits());
  const auto rows = gated.transpose();
  results.emplace_back("rows", Bits(rows.begin(), rows.end()));
  std::vector<Attention> partials;
  partials.push_back(run.attend(inputs, gated));
  results.emplace_back("attend", partials[0].bits());
  Chosen any(run.plan());
  choose_anything(c, any, 3);
  partials.push_back(run.attend(inputs, any));
  results.emplace_back("attend of any selection", partials[1].bits());
  results.emplace_back("merge", run.merge(partials).bits());
  return results;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& [d, b] : {std::pair{64, 32}, {128, 128}, {128, 144}, {96, 48}}) {
    for (const bool causal : {true, false}) {
      Case c{
          .name = "repeated", .dtype = causal ? DType::bf16 : DType::f16, .q_heads = 6, .kv_heads = 3, .head_dim = d};
      c.q_lengths = {1, 600, 0, 90, 200, 3, 400};
      c.k_lengths = {1, 700, 5, 70, 200, 0, 400};
      c.config = {.block_size = b, .top_k = 4, .causal = causal};
      c.rope = Rope{};
      c.seed = run_seed();
      all.push_back(c);
    }
  }
  return all;
}

void expect_same(const Case& c, const Data& data, const Options& options,
                 const std::vector<std::pair<std::string, Bits>>& expected) {
  const auto got = everything(c, data, options);
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(got[i].second == expected[i].second) << got[i].first;
}

class CudaDeterminism : public CudaTest {};

TEST_F(CudaDeterminism, ThirtyRunsGiveTheSameBits) {
  for (const Case& c : cases()) {
    const Data data(c);
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      const auto expected = everything(c, data, cuda_options(family));
      CudaRunner run(c.problem(), cuda_options(family));
      for (int i = 0; i < 30; ++i) {
        ASSERT_TRUE(run.forward(data.inputs()).bits() == expected[0].second) << "forward, run " << i;
        ASSERT_TRUE(run.dense(data.inputs()).bits() == expected[1].second) << "dense, run " << i;
      }
      for (int i = 0; i < 3; ++i) expect_same(c, data, cuda_options(family), expected);
    }
  }
}

// Slabs of some heads, of one, of parts of the tokens.
TEST_F(CudaDeterminism, TheMemoryOfAPlanDoesNotMatter) {
  for (const Case& c : cases()) {
    const Data data(c);
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      const auto expected = everything(c, data, cuda_options(family));
      const std::size_t least = least_workspace(c.problem(), family);
      ASSERT_GT(least, 0u);
      const std::size_t most = most_workspace(c.problem(), family);
      ASSERT_LT(least, most);
      for (const int part : {0, 1, 5, 20, 50, 80}) {
        const std::size_t limit = least + (most - least) / 100 * static_cast<std::size_t>(part);
        const Plan plan(c.problem(), cuda_options(family, limit));
        SCOPED_TRACE(plan.kernels());
        EXPECT_LE(plan.workspace_bytes(), most);
        expect_same(c, data, cuda_options(family, limit), expected);
      }
    }
  }
}

// Later keys that outweigh the earlier ones, and scores that are huge: where a kernel changes its way for a row, the
// rows beside it keep their bits.
TEST_F(CudaDeterminism, TheMemoryOfAPlanDoesNotMatterWhereScoresJump) {
  for (const std::int64_t block_size : {64, 128, 144, 512}) {
    for (const float jump : {20.0f, 3e4f}) {
      Case c = cases().front();
      c.config.block_size = block_size, c.config.top_k = 3;
      c.q_lengths = c.k_lengths = {2000, 700};
      Data data(c);
      for (std::int64_t token = 0; token < data.k.dim(0); ++token) {
        if (token % 97 < 90) continue;  // some keys of every block, so that some rows meet them and others do not
        for (std::int64_t head = 0; head < data.k.dim(1); ++head) {
          for (std::int64_t i = 0; i < data.k.dim(2); ++i) {
            data.k.set(token, head, i, data.k.get(token, head, i) * jump);
          }
        }
      }
      for (const std::string& family : families(c.problem())) {
        SCOPED_TRACE(::testing::Message() << "B " << block_size << ", jump " << jump << ", " << family);
        const auto expected = everything(c, data, cuda_options(family));
        const std::size_t least = least_workspace(c.problem(), family);
        const std::size_t most = most_workspace(c.problem(), family);
        for (const std::size_t limit : {least, (least + most) / 2}) {
          expect_same(c, data, cuda_options(family, limit), expected);
        }
      }
    }
  }
}

// The tensors of forward, dense and select on the device, where they stay from call to call.
struct Resident {
  Plan plan;
  Attention result, full;
  Chosen chosen;
  DeviceTensor q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, full_out, full_lse, ids, counts, offsets, rows;
  DeviceMemory workspace;

  Resident(const Case& c, const Data& data, const std::string& family)
      : plan(c.problem(), cuda_options(family)),
        result(plan.problem()),
        full(plan.problem()),
        chosen(plan),
        q(data.q.tensor()),
        k(data.k.tensor()),
        v(data.v.tensor()),
        cu_seqlens_q(data.cu_seqlens_q->tensor()),
        cu_seqlens_k(data.cu_seqlens_k->tensor()),
        out(result.out.tensor()),
        lse(result.lse.tensor()),
        full_out(full.out.tensor()),
        full_lse(full.lse.tensor()),
        ids(chosen.ids.tensor()),
        counts(chosen.counts.tensor()),
        offsets(chosen.offsets.tensor()),
        rows(chosen.rows.tensor()),
        workspace(plan.workspace_bytes()) {}

  void upload(const Data& data, cudaStream_t stream) {
    q.upload(data.q.tensor().data, stream);
    k.upload(data.k.tensor().data, stream);
    v.upload(data.v.tensor().data, stream);
    cu_seqlens_q.upload(data.cu_seqlens_q->tensor().data, stream);
    cu_seqlens_k.upload(data.cu_seqlens_k->tensor().data, stream);
    // Outputs without results.
    const Attention poison(plan.problem());
    for (const DeviceTensor* to : {&out, &full_out}) to->upload(poison.out.tensor().data, stream);
    for (const DeviceTensor* to : {&lse, &full_lse}) to->upload(poison.lse.tensor().data, stream);
    workspace.poison(stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
  }

  Inputs inputs() const { return {q.tensor(), k.tensor(), v.tensor(), cu_seqlens_q.tensor(), cu_seqlens_k.tensor()}; }

  // Everything into out and lse, by forward, or by stages; full attention into the others.
  void run(bool stages, cudaStream_t stream) const {
    const Outputs outputs{out.tensor(), lse.tensor()};
    if (stages) {
      const Selection selection{ids.tensor(), counts.tensor(), offsets.tensor(), rows.tensor()};
      select(plan, inputs(), selection, workspace.bytes(), {stream});
      attend(plan, inputs(), selection, outputs, workspace.bytes(), {stream});
    } else {
      forward(plan, inputs(), outputs, workspace.bytes(), {stream});
    }
    dense(plan, inputs(), {full_out.tensor(), full_lse.tensor()}, workspace.bytes(), {stream});
  }

  std::vector<Bits> results(cudaStream_t stream) {
    out.download(result.out.tensor().data, stream);
    lse.download(result.lse.tensor().data, stream);
    full_out.download(full.out.tensor().data, stream);
    full_lse.download(full.lse.tensor().data, stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
    return {result.bits(), full.bits()};
  }
};

// Nothing is loaded or allocated that a capture forbids. Means the most in a process of its own.
TEST_F(CudaDeterminism, GraphsOfFirstCalls) {
  const Case c = cases().front();
  const Data data(c);
  const cudaStream_t stream = test_stream();
  for (const std::string& family : families(c.problem())) {
    Resident resident(c, data, family);
    resident.upload(data, stream);
    const Graph graph(stream, [&] { resident.run(false, stream); });
    graph.launch(stream);
    const auto replayed = resident.results(stream);
    resident.upload(data, stream);
    resident.run(false, stream);
    EXPECT_TRUE(replayed == resident.results(stream)) << family;
  }
}

// A captured call is played with other inputs, and other lengths, in the same places.
TEST_F(CudaDeterminism, GraphsGiveWhatCallsGive) {
  for (const Case& c : cases()) {
    const Data first(c);
    Case other = c;
    other.seed = c.seed + 1;
    Data second(other);
    for (auto* table : {&*second.cu_seqlens_q, &*second.cu_seqlens_k}) table->as<std::int32_t>(4) += 7;
    const cudaStream_t stream = test_stream();
    for (const std::string& family : families(c.problem())) {
      for (const bool stages : {false, true}) {
        SCOPED_TRACE(::testing::Message() << c << ", " << family << (stages ? ", stages" : ", forward"));
        Resident resident(c, first, family);
        expect_replays(resident, first, second, stream, [&] { resident.run(stages, stream); });
      }
    }
  }
}

// One plan's problem on several streams at once, from as many threads.
TEST_F(CudaDeterminism, CallsMayRunSideBySide) {
  constexpr int kCallers = 4;
  for (Case c : cases()) {
    c.rope.reset();  // for the stages to give what forward gives
    const Data data(c);
    for (const std::string& family : families(c.problem())) {
      SCOPED_TRACE(::testing::Message() << c << ", " << family);
      std::vector<std::unique_ptr<Resident>> residents;
      std::vector<cudaStream_t> streams(kCallers);
      for (cudaStream_t& stream : streams) {
        MOBA_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        residents.push_back(std::make_unique<Resident>(c, data, family));
        residents.back()->upload(data, stream);
      }
      residents[0]->run(false, streams[0]);
      const std::vector<Bits> expected = residents[0]->results(streams[0]);
      std::vector<std::thread> callers;
      callers.reserve(kCallers);
      for (int i = 0; i < kCallers; ++i) {
        callers.emplace_back([&, i] {
          MOBA_CUDA(cudaSetDevice(device().index));
          for (int repeat = 0; repeat < 5; ++repeat) residents[i]->run(i % 2 == 1, streams[i]);
        });
      }
      for (std::thread& caller : callers) caller.join();
      for (int i = 0; i < kCallers; ++i) {
        EXPECT_TRUE(residents[i]->results(streams[i]) == expected) << "caller " << i;
        MOBA_CUDA(cudaStreamDestroy(streams[i]));
      }
      // The default stream too.
      residents[0]->upload(data, nullptr);
      residents[0]->run(false, nullptr);
      EXPECT_TRUE(residents[0]->results(nullptr) == expected) << "default stream";
    }
  }
}

// Kernels whose shared memory depends on the plan, launched by two threads with different plans.
TEST_F(CudaDeterminism, PlansOfDifferentSizesMayRunSideBySide) {
  std::vector<Case> all;
  for (const auto& [d, k, k_tokens] : {std::tuple{256, 40, 30000}, {128, 17, 9000}}) {
    Case c{.dtype = DType::bf16, .head_dim = d, .q_lengths = {64, 5}, .k_lengths = {k_tokens, 70}};
    c.config = {.block_size = 16, .top_k = k};
    c.rope = Rope{};
    all.push_back(c);
  }
  std::vector<std::unique_ptr<Resident>> residents;
  std::vector<std::vector<Bits>> expected;
  for (const Case& c : all) {
    const Data data(c);
    residents.push_back(std::make_unique<Resident>(c, data, "portable"));
    residents.back()->upload(data, test_stream());
    residents.back()->run(false, test_stream());
    expected.push_back(residents.back()->results(test_stream()));
  }
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < all.size(); ++i) {
    callers.emplace_back([&, i] {
      cudaStream_t stream;
      MOBA_CUDA(cudaSetDevice(device().index));
      MOBA_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      for (int repeat = 0; repeat < 200; ++repeat) residents[i]->run(false, stream);
      MOBA_CUDA(cudaStreamSynchronize(stream));
      MOBA_CUDA(cudaStreamDestroy(stream));
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (std::size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(residents[i]->results(test_stream()) == expected[i]);
}

}  // namespace
}  // namespace moba::test
