// backward over choices and values that are out of the ordinary: one list that holds all rows, lists that hold none,
// blocks that a row sees nothing of, keys that are all the same, scores that are huge.
#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>

#include "cases.h"
#include "cuda/setup.h"
#include "training.h"

namespace moba::test {
namespace {

using Choose = std::function<std::vector<std::int32_t>(std::int64_t token, std::int64_t head)>;

// A choice for a case, in the form that the gate makes or shared by the heads of a key head.
Chosen choose(const Case& c, bool shared, const Choose& blocks_of) {
  Chosen chosen(Plan(c.problem(), reference_options()), {}, shared);
  for (std::int64_t token = 0; token < chosen.ids.dim(0); ++token) {
    for (std::int64_t head = 0; head < chosen.ids.dim(1); ++head) {
      chosen.set_row(token, head, blocks_of(token, head));
    }
  }
  return chosen;
}

// Every family, over the choice or, where that is null, what the gate chooses.
std::vector<Trained> train_all(const Given& given, const Chosen* chosen) {
  std::vector<Trained> all;
  for (const std::string& family : families(given.c.problem())) {
    CudaRunner run(given.c.problem(), cuda_options(family));
    all.push_back(chosen == nullptr ? train(run, given) : train_on(run, given, *chosen));
  }
  return all;
}

bool is_all_zeros(const Array& x) {
  return std::ranges::all_of(x.numbers(), [](double element) { return element == 0; });
}

class CudaBackwardChoices : public CudaTest {};

// Rows that chose nothing, or only what lies in their future, get and give zeros.
TEST_F(CudaBackwardChoices, SmallRowsWithoutKeys) {
  for (const auto& [d, block_size] : {std::pair{64, 16}, {128, 128}, {128, 144}, {96, 48}}) {
    for (const bool shared : {false, true}) {
      Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {block_size, 40}};
      c.k_lengths = {std::int64_t{4} * block_size, 50};
      c.config = {.block_size = block_size, .top_k = 2};
      const Given given(c);
      const std::int32_t own = 3;  // of all rows of the first sequence
      const Chosen nothing = choose(c, shared, [](auto, auto) { return std::vector<std::int32_t>{}; });
      for (const Trained& trained : train_all(given, &nothing)) {
        EXPECT_TRUE(is_all_zeros(trained.slopes.dq) && is_all_zeros(trained.slopes.dk) &&
                    is_all_zeros(trained.slopes.dv));
      }
      const Chosen some = choose(c, shared, [&](std::int64_t token, std::int64_t head) {
        const bool first = token < c.q_lengths[0];
        return first && (token + head) % 3 == 0 ? std::vector<std::int32_t>{1, own} : std::vector<std::int32_t>{};
      });
      for (const Trained& trained : train_all(given, &some)) {
        EXPECT_TRUE(near(given, trained, f64_gradients(given, trained))) << c;
      }
    }
  }
}

TEST_F(CudaBackwardChoices, SmallOnlyTheFuture) {
  for (const std::int64_t d : {64, 128, 96}) {
    for (const bool shared : {false, true}) {
      Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {130}, .k_lengths = {130}};
      c.config = {.block_size = 16, .top_k = 3};
      const Given given(c);
      const std::int32_t last = 8;
      // The last block, whose keys only the last rows see; and that with one before the row's own, or the row's own.
      const Chosen future = choose(c, shared, [&](auto, auto) { return std::vector<std::int32_t>{last}; });
      const Chosen both = choose(c, shared, [&](std::int64_t token, std::int64_t head) {
        const auto block = static_cast<std::int32_t>(token / 16 / (1 + head));
        return block == last ? std::vector<std::int32_t>{last} : std::vector<std::int32_t>{block, last};
      });
      for (const Chosen* chosen : {&future, &both}) {
        for (const Trained& trained : train_all(given, chosen)) {
          EXPECT_TRUE(near(given, trained, f64_gradients(given, trained))) << c;
        }
      }
    }
  }
}

// More queries than keys: the first see none.
TEST_F(CudaBackwardChoices, SmallMoreQueriesThanKeys) {
  for (const auto& [d, block_size] : {std::pair{64, 16}, {128, 128}, {128, 144}, {96, 48}}) {
    Case c{.dtype = DType::f16, .q_heads = 3, .head_dim = d, .q_lengths = {190, 7, 30}, .k_lengths = {60, 0, 2}};
    c.config = {.block_size = block_size, .top_k = 2};
    const Given given(c);
    for (const std::string& family : families(c.problem())) {
      CudaRunner run(c.problem(), cuda_options(family));
      for (const Trained& trained : {train(run, given), train_dense(run, given)}) {
        EXPECT_TRUE(near(given, trained, f64_gradients(given, trained))) << c << ", " << family;
        EXPECT_EQ(trained.slopes.dq.get(129, 0, 5), 0);
        EXPECT_NE(trained.slopes.dq.get(135, 0, 5), 0);
      }
    }
  }
}

// One list holds all rows, that of block 0; the others hold a block's own rows, or none.
TEST_F(CudaBackwardChoices, SinkSkewed) {
  struct Sink {
    Given given;
    Chosen alone, with_own;
  };
  std::vector<Sink> sinks;
  for (const auto& [d, block_size] : {std::pair{64, 64}, {128, 128}, {128, 256}, {96, 32}}) {
    Case c{.name = "sink", .dtype = DType::bf16, .q_heads = 8, .kv_heads = 2, .head_dim = d, .q_lengths = {1500}};
    c.k_lengths = {1500};
    c.config = {.block_size = block_size, .top_k = 2};
    c.seed = run_seed();
    const auto own = [&, b = block_size](std::int64_t token) { return static_cast<std::int32_t>(token / b); };
    const Chosen alone = choose(c, true, [](auto, auto) { return std::vector<std::int32_t>{0}; });
    const Chosen with_own = choose(c, false, [&](std::int64_t token, std::int64_t) {
      return own(token) == 0 ? std::vector<std::int32_t>{0} : std::vector<std::int32_t>{0, own(token)};
    });
    sinks.push_back({Given(c), alone, with_own});
    // The gate chooses block 0 too.
    Data& data = sinks.back().given.data;
    for (std::int64_t token = 0; token < 1500; ++token) {
      for (std::int64_t head = 0; head < 8; ++head) data.q.set(token, head, 0, 3.0f);
      for (std::int64_t head = 0; head < 2; ++head) data.k.set(token, head, 0, token < block_size ? 4.0f : -4.0f);
    }
  }
  std::vector<std::pair<const Given*, Trained>> pending;
  for (const Sink& sink : sinks) {
    for (const Chosen* chosen : {&sink.alone, &sink.with_own, static_cast<const Chosen*>(nullptr)}) {
      for (Trained& trained : train_all(sink.given, chosen)) pending.emplace_back(&sink.given, std::move(trained));
    }
  }
  in_parallel(pending.size(), [&](std::size_t i) {
    const auto& [given, trained] = pending[i];
    for (std::int64_t token = 0; token < 1500; ++token) EXPECT_EQ(trained.chosen->row(token, 1).front(), 0);
    EXPECT_TRUE(near(*given, trained, cpu_gradients(*given, trained))) << given->c;
  });
}

// One list of more rows than a unit takes, in one slab and in slabs of the tokens: what its units have of its keys is
// added up.
TEST_F(CudaBackwardChoices, SmallListsThatAreCut) {
  for (const auto& [d, block_size, causal] : {std::tuple{64, 64, true},
                                              {64, 144, true},
                                              {64, 144, false},
                                              {128, 64, false},
                                              {128, 144, true},
                                              {128, 144, false},
                                              {96, 144, true},
                                              {256, 144, false}}) {
    Case c{.name = "cut", .dtype = DType::bf16, .q_heads = 9, .head_dim = d, .q_lengths = {200}, .k_lengths = {200}};
    c.config = {.block_size = block_size, .top_k = 1, .causal = causal};
    const Given given(c);
    const Chosen sink = choose(c, true, [](auto, auto) { return std::vector<std::int32_t>{0}; });
    for (const std::string& family : families(c.problem())) {
      for (const bool has_slabs : {false, true}) {
        if (has_slabs && block_size == 64) continue;  // no memory is saved by them
        CudaRunner run(c.problem(), cuda_options(family, has_slabs ? training_limit(c.problem(), family, 0) : 0));
        SCOPED_TRACE(::testing::Message() << c << ", " << run.plan().kernels());
        const cuda::Setup& setup = *run.plan().impl().cuda;
        EXPECT_EQ(has_slabs_and_passes(run.plan()), has_slabs);
        for (const cuda::BackwardSetup& backward : {setup.chosen_backward, setup.dense_backward}) {
          EXPECT_GT(backward.slab_tokens * setup.shape.group, backward.sections.last_most_rows) << "nothing is cut";
        }
        for (const Trained& trained : {train_on(run, given, sink), train_dense(run, given)}) {
          EXPECT_TRUE(near(given, trained, f64_gradients(given, trained))) << (trained.chosen ? "" : "all keys");
        }
      }
    }
  }
}

// So many rows that key heads go in several sections, whose units differ in size: the sink's list is cut in each.
TEST_F(CudaBackwardChoices, SectionsOfHeads) {
  Case c{.name = "sections", .dtype = DType::bf16, .q_heads = 8, .kv_heads = 8, .head_dim = 128, .q_lengths = {20000}};
  c.k_lengths = {20000};
  c.config = {.block_size = 128, .top_k = 2};
  c.seed = run_seed();
  const Given given(c);
  const Chosen chosen = choose(c, false, [](std::int64_t token, std::int64_t) {
    const auto own = static_cast<std::int32_t>(token / 128);
    return own == 0 ? std::vector<std::int32_t>{0} : std::vector<std::int32_t>{0, own};
  });
  for (const std::string& family : families(c.problem())) {
    CudaRunner run(c.problem(), cuda_options(family));
    for (const Trained& trained : {train_on(run, given, chosen), train_dense(run, given)}) {
      EXPECT_TRUE(near(given, trained, cpu_gradients(given, trained)))
          << family << (trained.chosen ? "" : ", all keys");
    }
  }
}

// One row attends to as many blocks as it may, the others to one.
TEST_F(CudaBackwardChoices, OneRowWithEveryBlock) {
  for (const std::int64_t d : {64, 128, 192}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {1024}, .k_lengths = {1024}};
    c.config = {.block_size = 16, .top_k = 64, .causal = false};
    c.seed = run_seed();
    const Given given(c);
    std::vector<std::int32_t> all(64);
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int32_t>(i);
    const Chosen chosen = choose(c, false, [&](std::int64_t token, std::int64_t head) {
      return token == 500 && head == 2 ? all : std::vector<std::int32_t>{static_cast<std::int32_t>(token / 16)};
    });
    for (const Trained& trained : train_all(given, &chosen)) {
      EXPECT_TRUE(near(given, trained, cpu_gradients(given, trained))) << c;
    }
  }
}

// All keys are one key, or small whole numbers, many of which tie: weights are equal, and their slopes cancel. What is
// left is the rounding of the slopes to the type that they are multiplied in.
TEST_F(CudaBackwardChoices, SmallTies) {
  for (const DType dtype : kTypes) {
    for (const bool equal : {true, false}) {
      for (const std::int64_t d : {64, 128, 32}) {
        Case c{.dtype = dtype, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {150}, .k_lengths = {150}};
        c.config = {.block_size = 16, .top_k = 3};
        Given given(c);
        given.data.q.fill_integers(run_seed(), 1);
        given.data.k.fill_integers(run_seed() + 1, 1);
        for (std::int64_t token = 1; equal && token < 150; ++token) {
          for (std::int64_t head = 0; head < 2; ++head) {
            for (std::int64_t x = 0; x < d; ++x) given.data.k.set(token, head, x, given.data.k.get(0, head, x));
          }
        }
        const double rounding = dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
        for (const Trained& trained : train_all(given, nullptr)) {
          EXPECT_TRUE(near(given, trained, f64_gradients(given, trained), equal ? rounding : 0)) << c;
        }
      }
    }
  }
}

// Scores in the hundreds and thousands: a row attends to one key, and the rounding of the scores is that of the
// weights.
TEST_F(CudaBackwardChoices, LargeScores) {
  for (const DType dtype : kTypes) {
    for (const float amplitude : {30.0f, 300.0f}) {
      for (const std::int64_t d : {64, 128}) {
        Case c{.dtype = dtype, .q_heads = 2, .head_dim = d, .q_lengths = {150}, .k_lengths = {150}};
        c.config = {.block_size = 32, .top_k = 3};
        c.seed = run_seed();
        c.q_amplitude = c.k_amplitude = amplitude;
        const Given given(c);
        const double extra = 4 * score_error(given.data, scale_of(c));
        for (const std::string& family : families(c.problem())) {
          CudaRunner run(c.problem(), cuda_options(family));
          for (const Trained& trained : {train(run, given), train_dense(run, given)}) {
            EXPECT_TRUE(near(given, trained, f64_gradients(given, trained), extra)) << c << ", " << family;
          }
        }
      }
    }
  }
}

// Nothing flows back where nothing is asked for.
TEST_F(CudaBackwardChoices, SmallDoutOfZeros) {
  for (const std::int64_t d : {64, 128, 256}) {
    Case c{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = d, .q_lengths = {90}, .k_lengths = {120}};
    c.config = {.block_size = 32, .top_k = 2};
    Given given(c);
    given.dout.fill_value(0);
    for (const Trained& trained : train_all(given, nullptr)) {
      EXPECT_TRUE(is_all_zeros(trained.slopes.dq) && is_all_zeros(trained.slopes.dk) &&
                  is_all_zeros(trained.slopes.dv));
    }
  }
}

}  // namespace
}  // namespace moba::test
