#include "trial.h"

#include <algorithm>
#include <cmath>
#include <ostream>

namespace moba::test {

namespace {

template <class T>
T one_of(const Draw& draw, std::initializer_list<T> all) {
  return all.begin()[draw(0, std::ssize(all) - 1)];
}

bool one_in(const Draw& draw, std::int64_t n) { return draw(1, n) == 1; }

Layout draw_layout(const Draw& draw) {
  return {.gap = one_of<std::int64_t>(draw, {0, 0, 0, 1, 7, 16}),
          .swapped = one_in(draw, 3),
          .offset = draw(0, 15),
          .tight = one_in(draw, 3)};
}

Rope draw_rope(const Draw& draw, std::int64_t head_dim) {
  Rope rope;
  rope.style = one_of(draw, {RopeStyle::half_split, RopeStyle::interleaved});
  rope.rotary_dim = 2 * draw(1, head_dim / 2);
  rope.scaling = one_of(draw, {RopeScaling::none, RopeScaling::linear, RopeScaling::llama3, RopeScaling::yarn});
  rope.base = static_cast<double>(draw(2, 1000000));
  rope.factor = static_cast<double>(draw(1, 20));
  rope.original_max_position = static_cast<double>(draw(1, 10000));
  return rope;
}

void draw_lengths(const Draw& draw, std::int64_t most_tokens, Case& c) {
  const auto length = [&] { return one_in(draw, 5) ? draw(0, 2) : draw(0, most_tokens); };
  c.q_lengths.resize(static_cast<std::size_t>(one_of(draw, {1, 1, 1, 1, 2, 3, 5, 0})));
  c.k_lengths.clear();
  const bool prompt = one_in(draw, 2);
  for (std::int64_t& q : c.q_lengths) {
    q = length();
    c.k_lengths.push_back(prompt || one_in(draw, 4) ? q : length());
  }
}

bool is_prompt(const Case& c) { return c.config.causal && c.q_lengths == c.k_lengths; }

// Above those of noise with the scale that is taken by default.
bool has_large_scores(const Trial& trial) {
  return trial.values == Values::large_scores ||
         std::abs(scale_of(trial.c)) > 1 / std::sqrt(static_cast<double>(trial.c.head_dim));
}

void fill_values(const Trial& trial, Data& data) {
  const Case& c = trial.c;
  switch (trial.values) {
    case Values::noise:
    case Values::large_scores:
      return;
    case Values::whole_numbers:
      data.q.fill_integers(c.seed, 1);
      data.k.fill_integers(c.seed + 1, 1);
      return;
    case Values::equal_keys:
    case Values::repeated_blocks:
      break;
  }
  const std::int64_t period = trial.values == Values::equal_keys ? 1 : c.config.block_size;
  std::int64_t first = 0;
  for (const std::int64_t length : c.k_lengths) {
    for (std::int64_t j = period; j < length; ++j) {
      for (std::int64_t head = 0; head < c.kv_heads; ++head) {
        for (std::int64_t x = 0; x < c.head_dim; ++x) {
          data.k.set(first + j, head, x, data.k.get(first + j % period, head, x));
        }
      }
    }
    first += length;
  }
}

::testing::AssertionResult same(const char* what, const std::vector<std::uint64_t>& got,
                                const std::vector<std::uint64_t>& expected) {
  if (got == expected) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << what << " differ, bit for bit";
}

::testing::AssertionResult named(const char* what, const ::testing::AssertionResult& result) {
  if (result) return result;
  return ::testing::AssertionFailure() << what << ": " << result.message();
}

// A trial with its data, and what the reference makes of them.
class Judge {
 public:
  explicit Judge(const Trial& trial)
      : trial_(trial),
        data_(data_of(trial)),
        dout_(noise_dout(trial.c)),
        given_(data_.inputs()),
        turned_(given_),
        reference_(trial.c.problem(), reference_options()),
        cpu_(trial.c.problem(), trial.options),
        chosen_(cpu_.plan()),
        kept_(cpu_.plan(), trial.c.outputs),
        extra_(has_large_scores(trial) ? 2 * score_error(data_, scale_of(trial.c)) : 0) {}

  ::testing::AssertionResult agrees() {
    if (const auto result = rope(); !result) return result;
    if (const auto result = selection(); !result) return named("selection", result);
    Attention got = cpu_.forward(given_, kept_, trial_.c.outputs);
    if (!cpu_.plan().forward_is_dense() && kept_.ids.bits() != chosen_.ids.bits()) {
      return ::testing::AssertionFailure() << "forward kept other ids";
    }
    const reference::Rows rows = attend_f64(cpu_, turned_, chosen_);
    if (const auto result = near(got, rows); !result) return named("forward", result);
    if (const auto result = gradients(got); !result) return named("backward", result);
    return is_prompt(trial_.c) ? named("cache", cached(rows)) : ::testing::AssertionSuccess();
  }

 private:
  ::testing::AssertionResult rope() {
    if (!trial_.c.rope) return ::testing::AssertionSuccess();
    rotated_ = reference_.rope(given_);
    const auto got = cpu_.rope(given_, trial_.c.outputs);
    turned_.q = rotated_.first.tensor();
    turned_.k = rotated_.second.tensor();
    const auto q = same("rotated q", got.first.bits(), rotated_.first.bits());
    return q ? same("rotated k", got.second.bits(), rotated_.second.bits()) : q;
  }

  ::testing::AssertionResult selection() {
    const Array centroids = reference_.pool(turned_);
    if (const auto result = same("centroids", cpu_.pool(turned_).bits(), centroids.bits()); !result) return result;
    chosen_ = cpu_.select(turned_, trial_.c.outputs);
    const auto result = explained(trial_.c, turned_, centroids, reference_.gate(turned_, centroids), chosen_);
    if (!result) return result;
    Chosen transposed(cpu_.plan());
    transposed.ids = chosen_.ids;
    reference_.index(turned_, transposed);
    if (chosen_.transpose() != transposed.transpose())
      return ::testing::AssertionFailure() << "rows are not the transpose";
    return same("offsets", chosen_.offsets.bits(), transposed.offsets.bits());
  }

  ::testing::AssertionResult near(const Attention& got, const reference::Rows& rows) {
    if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << "wrote beyond out or lse";
    return close(got, rows, trial_.c.dtype, extra_);
  }

  ::testing::AssertionResult gradients(Attention& results) {
    const Slopes got = cpu_.backward(given_, kept_, results, dout_, trial_.c.outputs);
    if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << "wrote beyond the gradients";
    return close(got, backward_f64(cpu_, turned_, &chosen_, dout_, &results), data_, dout_, scale_of(trial_.c),
                 gradient_bound(trial_.c.dtype), extra_);
  }

  // The prompt over a cache, against the float64 of one prefill.
  ::testing::AssertionResult cached(const reference::Rows& rows) {
    const Case& c = trial_.c;
    const Steps steps = by_random_chunks(c.k_lengths, trial_.chunk, c.seed);
    const Fed fed = feed(c, data_, steps, trial_.cache, trial_.options);
    Attention got(c.problem());
    got.out = fed.out;
    got.lse = fed.lse;
    const auto ids = same("ids", fed.ids.bits(), chosen_.ids.bits());
    return ids ? near(got, rows) : ids;
  }

  const Trial& trial_;
  Data data_;
  Array dout_;
  Inputs given_, turned_;  // turned_: rotated, if the case has a rope
  std::pair<Array, Array> rotated_;
  Runner reference_, cpu_;
  Chosen chosen_, kept_;  // by select; by forward, which fills it only where it is not dense
  double extra_;          // what large scores may be off by
};

}  // namespace

std::ostream& operator<<(std::ostream& stream, const Trial& trial) {
  constexpr const char* kValues[] = {"noise", "whole numbers", "equal keys", "repeated blocks", "large scores"};
  stream << trial.c << ", scale " << scale_of(trial.c) << (trial.c.rope ? ", rope" : "") << ", "
         << kValues[static_cast<int>(trial.values)] << ", " << describe(trial.options);
  if (!is_prompt(trial.c)) return stream;
  return stream << ", cache form " << static_cast<int>(trial.cache.form) << " pages " << trial.cache.page_size
                << " chunks " << trial.chunk;
}

Trial draw_trial(const Draw& draw, std::int64_t most_tokens) {
  Trial trial;
  Case& c = trial.c;
  c.dtype = one_of(draw, {DType::f32, DType::f16, DType::bf16});
  c.kv_heads = draw(1, 3);
  c.q_heads = c.kv_heads * one_of<std::int64_t>(draw, {1, 1, 2, 2, 3, 5, 9});
  c.head_dim = one_in(draw, 8) ? draw(41, 256) : draw(8, 40);
  draw_lengths(draw, most_tokens, c);
  c.config.block_size = one_in(draw, 4) ? draw(33, 2 * most_tokens) : draw(1, 32);
  c.config.top_k = one_in(draw, 5) ? draw(6, 60) : draw(1, 5);
  c.config.causal = !one_in(draw, 3);
  if (one_in(draw, 6)) c.config.scale = static_cast<double>(draw(-8, 8)) / 16;
  if (one_in(draw, 3)) c.rope = draw_rope(draw, c.head_dim);
  c.inputs = draw_layout(draw);
  c.outputs = draw_layout(draw);
  c.seed = static_cast<std::uint64_t>(draw(0, 999999));
  trial.values = one_of(draw, {Values::noise, Values::noise, Values::whole_numbers, Values::equal_keys,
                               Values::repeated_blocks, Values::large_scores});
  if (trial.values == Values::large_scores) c.q_amplitude = 60, c.k_amplitude = 10;
  const std::vector<Options> kernels = every_cpu_kernel(c.dtype);
  trial.options = kernels[static_cast<std::size_t>(draw(0, std::ssize(kernels) - 1))];
  trial.options.threads = static_cast<int>(draw(1, 4));
  trial.cache.form = one_of(draw, {CacheForm::contiguous, CacheForm::block_table, CacheForm::csr});
  trial.cache.page_size = draw(1, 48);
  trial.cache.heads_first = one_in(draw, 2);
  trial.chunk = one_of<std::int64_t>(draw, {1, 8, 100, 1000});
  return trial;
}

Data data_of(const Trial& trial) {
  Data data(trial.c);
  fill_values(trial, data);
  return data;
}

::testing::AssertionResult cpu_agrees(const Trial& trial) { return Judge(trial).agrees(); }

}  // namespace moba::test
