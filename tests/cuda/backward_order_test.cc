// Calls one behind the other on a stream, in one workspace, without a wait between them: none begins with what the one
// before it still uses, or ends in what the next one has begun. Kernels are launched while those before them end
// (src/cuda/launch.h), so every call is put behind every other, and all write what nobody else writes.
#include <algorithm>
#include <map>
#include <memory>
#include <numeric>

#include "cuda/launch.h"
#include "graph.h"
#include "resident.h"

namespace moba::test {
namespace {

// One of the functions on one problem.
struct Kind {
  const ResidentTraining* problem;
  bool all_keys, is_backward;

  friend std::ostream& operator<<(std::ostream& stream, const Kind& kind) {
    return stream << (kind.all_keys         ? "dense"
                      : kind.problem->gated ? "forward"
                                            : "attend")
                  << (kind.is_backward ? "'s backward" : "") << " of " << kind.problem->plan.problem().total_q
                  << " tokens, " << kind.problem->plan.kernels();
  }
};

// What a forward pass writes, and a backward one.
struct Results {
  Written out, lse, ids;

  explicit Results(const ResidentTraining& like)
      : out(like.out.nothing()), lse(like.lse.nothing()), ids(like.ids.nothing()) {}
};
struct Derivatives {
  Written dq, dk, dv;

  explicit Derivatives(const ResidentTraining& like)
      : dq(like.dq.nothing()), dk(like.dk.nothing()), dv(like.dv.nothing()) {}
};

// A call with memory of its own for what it writes.
class Call {
 public:
  // Writes `results`, or, if backward, reads them.
  Call(const Kind& kind, std::shared_ptr<const Results> results) : kind_(kind), results_(std::move(results)) {
    if (kind_.is_backward) derivatives_ = std::make_unique<const Derivatives>(*kind_.problem);
  }

  void forget(cudaStream_t stream) const {
    for (const Written* one : all()) one->forget(stream);
  }
  void run(Workspace memory, cudaStream_t stream) const {
    const Results& r = *results_;
    const Selection kept{r.ids.tensor(), {}, {}, {}};
    const Outputs outputs{r.out.tensor(), r.lse.tensor()};
    if (!kind_.is_backward) return kind_.problem->forward_pass(kind_.all_keys, kept, outputs, memory, stream);
    const Derivatives& d = *derivatives_;
    kind_.problem->backward_pass(kind_.all_keys, kept, {outputs.out, outputs.lse},
                                 {d.dq.tensor(), d.dk.tensor(), d.dv.tensor()}, memory, stream);
  }
  std::vector<Bytes> written(cudaStream_t stream) const {
    std::vector<Bytes> bytes;
    for (const Written* one : all()) bytes.push_back(one->bytes(stream));
    return bytes;
  }

 private:
  std::vector<const Written*> all() const {
    if (!kind_.is_backward) return {&results_->out, &results_->lse, &results_->ids};
    return {&derivatives_->dq, &derivatives_->dk, &derivatives_->dv};
  }

  Kind kind_;
  std::shared_ptr<const Results> results_;
  std::unique_ptr<const Derivatives> derivatives_;
};

// Backward reads what the last forward call before it on the same problem wrote.
std::vector<Call> calls_of(const std::vector<Kind>& kinds, const std::vector<std::size_t>& order) {
  std::map<std::pair<const ResidentTraining*, bool>, std::shared_ptr<const Results>> last;
  std::vector<Call> calls;
  for (const std::size_t i : order) {
    auto& results = last[{kinds[i].problem, kinds[i].all_keys}];
    if (!kinds[i].is_backward) results = std::make_shared<const Results>(*kinds[i].problem);
    calls.emplace_back(kinds[i], results);
  }
  return calls;
}

// Each of n kinds behind each other one, and behind itself, once.
std::vector<std::size_t> every_order(std::size_t n) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < n; ++i) {
    order.push_back(i);
    for (std::size_t j = i + 1; j < n; ++j) order.insert(order.end(), {i, j});
  }
  order.push_back(0);
  return order;
}

// Two problems with plans of their own: all that they can be asked for, one by one, then 65 calls in one go, as they
// come and from a graph, where no launch is late.
void expect_any_order(const ResidentTraining& one, const ResidentTraining& other) {
  const cudaStream_t stream = test_stream();
  std::vector<Kind> kinds;
  for (const ResidentTraining* problem : {&one, &other}) {
    for (const bool all_keys : {false, true}) {
      for (const bool is_backward : {false, true}) kinds.push_back({problem, all_keys, is_backward});
    }
  }
  const DeviceMemory memory(std::max(one.workspace.size(), other.workspace.size()));
  std::vector<std::size_t> first(kinds.size());
  std::iota(first.begin(), first.end(), 0);
  std::vector<std::vector<Bytes>> alone;
  for (const Call& call : calls_of(kinds, first)) {
    call.forget(stream);
    memory.poison(stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
    call.run(memory.bytes(), stream);
    alone.push_back(call.written(stream));
  }

  const std::vector<std::size_t> order = every_order(kinds.size());
  const std::vector<Call> calls = calls_of(kinds, order);
  const auto run_all = [&] {
    for (const Call& call : calls) call.run(memory.bytes(), stream);
  };
  const Graph graph(stream, run_all);
  for (int round = 0; round < 4; ++round) {
    for (const Call& call : calls) call.forget(stream);
    memory.poison(stream);
    MOBA_CUDA(cudaStreamSynchronize(stream));
    if (round % 2 == 0) {
      run_all();
    } else {
      graph.launch(stream);
    }
    for (std::size_t i = 0; i < calls.size(); ++i) {
      EXPECT_TRUE(calls[i].written(stream) == alone[order[i]])
          << "round " << round << ", call " << i << ", " << kinds[order[i]] << (i == 0 ? ", the first" : ", behind ")
          << (i == 0 ? "" : ::testing::PrintToString(kinds[order[i - 1]]));
    }
  }
}

void expect_any_order(const Choice& one, const Options& options, const Choice& other, const Options& other_options) {
  const ResidentTraining a(one, options), b(other, other_options);
  a.upload(one.given, test_stream());
  b.upload(other.given, test_stream());
  expect_any_order(a, b);
}

class CudaBackwardOrder : public CudaTest {};

// Kernels that are shorter than their launches; of one family, and of both by turns.
TEST_F(CudaBackwardOrder, OfShortCalls) {
  Case packed{.name = "packed", .dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 64};
  packed.q_lengths = {60, 39}, packed.k_lengths = {75, 99};
  packed.config = {.block_size = 16, .top_k = 3};
  packed.rope = Rope{};
  packed.seed = run_seed();
  Case single{.name = "single", .dtype = DType::f16, .q_heads = 3, .head_dim = 128, .seed = run_seed() + 1};
  single.q_lengths = {130}, single.k_lengths = {190};
  single.config = {.block_size = 48, .top_k = 2, .causal = false};
  const Choice one{Given(packed), false}, other{Given(single), false};
  for (const std::string& family : families(packed.problem())) {
    for (const std::string& other_family : families(single.problem())) {
      expect_any_order(one, cuda_options(family), other, cuda_options(other_family));
    }
  }
}

// Lists of all lengths, and one that many units share.
TEST_F(CudaBackwardOrder, OfLongerCalls) {
  const Choice sink = long_choice(2000, 64, 64, true);
  for (const Choice& choice : small_choices()) {
    if (choice.given.c.head_dim != 128) continue;
    for (const std::string& family : families(choice.given.c.problem())) {
      expect_any_order(choice, cuda_options(family), sink, cuda_options(family));
    }
  }
}

// Several slabs and passes of each call, which use the same scratch one behind the other as well.
TEST_F(CudaBackwardOrder, OfPlansWithLittleMemory) {
  const Choice one = long_choice(1500, 128, 512, true), other = long_choice(1000, 64, 256, false);
  for (const std::string& family : families(one.given.c.problem())) {
    const auto little = [&](const Choice& choice) {
      const Problem problem = choice.given.c.problem();
      Options options = cuda_options(family, training_limit(problem, family, 5));
      EXPECT_TRUE(has_slabs_and_passes(Plan(problem, options))) << choice.given.c;
      return options;
    };
    expect_any_order(one, little(one), other, little(other));
  }
}

}  // namespace
}  // namespace moba::test
