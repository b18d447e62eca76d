// Properties that hold for every problem, on problems that RapidCheck makes up. On a failure it prints the smallest
// case it finds and how to run it again (RC_PARAMS).
#include <gtest/gtest.h>  // before RapidCheck's
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>

#include "support.h"

namespace moba::test {
namespace {

// [least, most), smaller values when shrinking.
rc::Gen<std::int64_t> between(std::int64_t least, std::int64_t most) {
  return rc::gen::inRange<std::int64_t>(least, most);
}

rc::Gen<Layout> layouts() {
  return rc::gen::exec([] {
    Layout layout;
    layout.gap = *rc::gen::weightedElement<std::int64_t>({{3, 0}, {1, 1}, {1, 7}, {1, 16}});
    layout.swapped = *rc::gen::weightedElement<bool>({{2, false}, {1, true}});
    layout.offset = *between(0, 16);
    layout.tight = *rc::gen::weightedElement<bool>({{2, false}, {1, true}});
    return layout;
  });
}

rc::Gen<Case> problems() {
  return rc::gen::exec([] {
    Case c;
    c.dtype = *rc::gen::element(DType::f32, DType::f16, DType::bf16);
    c.kv_heads = *between(1, 4);
    c.q_heads = c.kv_heads * *rc::gen::weightedElement<std::int64_t>({{4, 1}, {4, 2}, {2, 3}, {1, 5}, {1, 9}});
    c.head_dim = *rc::gen::weightedOneOf<std::int64_t>({{3, between(8, 40)}, {1, between(40, 257)}});
    const std::size_t batch =
        static_cast<std::size_t>(*rc::gen::weightedElement<int>({{6, 1}, {1, 0}, {2, 2}, {2, 5}}));
    c.q_lengths.clear();
    c.k_lengths.clear();
    for (std::size_t s = 0; s < batch; ++s) {
      c.q_lengths.push_back(*rc::gen::weightedOneOf<std::int64_t>({{1, between(0, 3)}, {4, between(0, 120)}}));
      const bool equal = *rc::gen::arbitrary<bool>();
      c.k_lengths.push_back(equal ? c.q_lengths[s]
                                  : *rc::gen::weightedOneOf<std::int64_t>({{1, between(0, 3)}, {4, between(0, 300)}}));
    }
    c.config.block_size = *rc::gen::weightedOneOf<std::int64_t>({{3, between(1, 40)}, {1, between(40, 400)}});
    c.config.top_k = *rc::gen::weightedOneOf<std::int64_t>({{4, between(1, 6)}, {1, between(6, 60)}});
    c.config.causal = *rc::gen::weightedElement<bool>({{2, true}, {1, false}});
    c.inputs = *layouts();
    c.outputs = *layouts();
    c.seed = static_cast<std::uint64_t>(*between(0, 1000));
    return c;
  });
}

Options any_kernel(DType dtype) {
  Options options = *rc::gen::elementOf(every_cpu_kernel(dtype));
  options.threads = static_cast<int>(*between(1, 6));
  return options;
}

// RapidCheck and GoogleTest meet here.
void require(const ::testing::AssertionResult& result, const std::string& what) {
  if (!result) RC_FAIL(what + ": " + result.message());
}

RC_GTEST_PROP(Property, SelectionIsExplained, ()) {
  const Case c = *problems();
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  Runner reference(c.problem(), reference_options()), run(c.problem(), options);
  const Array centroids = reference.pool(data.inputs()), got_centroids = run.pool(data.inputs(), c.outputs);
  RC_ASSERT(got_centroids.bits() == centroids.bits());
  RC_ASSERT(got_centroids.surroundings_untouched());
  const Chosen expected = reference.gate(data.inputs(), centroids);
  require(well_formed(c, expected), "reference");
  Layout layout = c.outputs;
  Chosen chosen = run.select(data.inputs(), layout);
  require(explained(c, data.inputs(), centroids, expected, chosen), describe(options));
  RC_ASSERT(chosen.surroundings_untouched());
  Chosen transposed(run.plan());
  transposed.ids = chosen.ids;
  reference.index(data.inputs(), transposed);
  RC_ASSERT(chosen.offsets.bits() == transposed.offsets.bits());
  RC_ASSERT(chosen.transpose() == transposed.transpose());
  RC_ASSERT(chosen.counts.bits() == transposed.counts.bits());
}

RC_GTEST_PROP(Property, ForwardIsCloseToFloat64, ()) {
  const Case c = *problems();
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  Runner run(c.problem(), options);
  Chosen chosen = run.select(data.inputs());
  const Attention got = run.forward(data.inputs(), c.outputs);
  require(close(got, attend_f64(run, data.inputs(), chosen), c.dtype), describe(options));
  RC_ASSERT(got.surroundings_untouched());
}

RC_GTEST_PROP(Property, AnySelectionIsCloseToFloat64, ()) {
  const Case c = *problems();
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  Runner run(c.problem(), options);
  Chosen chosen(run.plan(), c.outputs, *rc::gen::arbitrary<bool>());
  choose_anything(c, chosen, c.seed);
  run.index(data.inputs(), chosen);
  const Attention got = run.attend(data.inputs(), chosen, c.outputs);
  require(close(got, attend_f64(run, data.inputs(), chosen), c.dtype), describe(options));
  RC_ASSERT(got.surroundings_untouched());
}

RC_GTEST_PROP(Property, GradientsAreCloseToFloat64, ()) {
  const Case c = *problems();
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  const Array dout = noise_dout(c);
  Runner run(c.problem(), options);
  Chosen chosen(run.plan(), c.outputs);
  Attention results = run.forward(data.inputs(), chosen, c.outputs);
  const Slopes got = run.backward(data.inputs(), chosen, results, dout, c.outputs);
  Chosen* const read = run.plan().forward_is_dense() ? nullptr : &chosen;
  require(close(got, backward_f64(run, data.inputs(), read, dout, &results), data, dout, scale_of(c),
                gradient_bound(c.dtype)),
          describe(options));
  RC_ASSERT(got.surroundings_untouched());
}

RC_GTEST_PROP(Property, ThreadsDoNotMatter, ()) {
  const Case c = *problems();
  Options options = any_kernel(c.dtype);
  const Data data(c);
  const Attention some = Runner(c.problem(), options).forward(data.inputs());
  options.threads = 1;
  RC_ASSERT(some.bits() == Runner(c.problem(), options).forward(data.inputs()).bits());
}

RC_GTEST_PROP(Property, LayoutDoesNotMatter, ()) {
  Case c = *problems();
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  const Attention some = Runner(c.problem(), options).forward(data.inputs(), c.outputs);
  c.inputs = {};
  const Data plain(c);
  RC_ASSERT(some.bits() == Runner(c.problem(), options).forward(plain.inputs()).bits());
}

RC_GTEST_PROP(Property, EnoughBlocksAreDense, ()) {
  Case c = *problems();
  RC_PRE(!c.k_lengths.empty());
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  const std::int64_t longest = std::ranges::max(c.k_lengths);
  c.config.top_k =
      std::max<std::int64_t>(1, (longest + c.config.block_size - 1) / c.config.block_size) + *between(0, 3);
  Runner run(c.problem(), options);
  const Attention dense = run.dense(data.inputs());
  RC_ASSERT(run.forward(data.inputs()).bits() == dense.bits());
  require(close(dense, dense_f64(run, data.inputs()), c.dtype), describe(options));
  Chosen chosen = run.select(data.inputs());
  require(close(run.attend(data.inputs(), chosen), dense_f64(run, data.inputs()), c.dtype), describe(options));
}

// Keys dealt out to two calls, without a mask: merged they are attention over all.
RC_GTEST_PROP(Property, MergeOfASplitIsTheWhole, ()) {
  Case c = *problems();
  c.q_lengths = {*between(0, 60)};
  c.k_lengths = {*between(0, 300)};
  c.config.causal = false;
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  const std::int64_t cut = *between(0, c.k_lengths[0] + 1);
  std::vector<Attention> partials;
  for (const auto& [begin, end] : {std::pair{std::int64_t{0}, cut}, {cut, c.k_lengths[0]}}) {
    Case piece = c;
    piece.k_lengths = {end - begin};
    Inputs inputs = data.inputs();
    for (ConstTensor* t : {&inputs.k, &inputs.v}) {
      t->shape[0] = end - begin;
      t->data = static_cast<const std::byte*>(t->data) +
                begin * t->stride[0] * static_cast<std::int64_t>(size_in_bytes(c.dtype));
    }
    partials.push_back(Runner(piece.problem(), options).dense(inputs));
  }
  Runner whole(c.problem(), options);
  const double extra = c.dtype == DType::f32 ? 0 : tolerance(c.dtype);  // partials are rounded too
  require(close(whole.merge(partials), dense_f64(whole, data.inputs()), c.dtype, extra), describe(options));
}

RC_GTEST_PROP(Property, RopeGivesTheReferencesBits, ()) {
  Case c = *problems();
  Rope rope;
  rope.style = *rc::gen::element(RopeStyle::half_split, RopeStyle::interleaved);
  rope.scaling = *rc::gen::element(RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn);
  rope.rotary_dim = 2 * *between(1, c.head_dim / 2 + 1);
  rope.factor = static_cast<double>(*between(1, 20));
  rope.base = static_cast<double>(*between(2, 1000000));
  rope.original_max_position = static_cast<double>(*between(1, 10000));
  c.rope = rope;
  const Options options = any_kernel(c.dtype);
  const Data data(c);
  const auto expected = Runner(c.problem(), reference_options()).rope(data.inputs());
  const auto got = Runner(c.problem(), options).rope(data.inputs(), c.outputs);
  RC_ASSERT(got.first.bits() == expected.first.bits());
  RC_ASSERT(got.second.bits() == expected.second.bits());
  RC_ASSERT(got.first.surroundings_untouched() && got.second.surroundings_untouched());
}

}  // namespace
}  // namespace moba::test
