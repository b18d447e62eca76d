// What the tests share: tensors with gaps and guards around them, problems with their data, runs of a backend, and the
// rules by which results are compared.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "call.h"
#include "moba/moba.h"
#include "numeric.h"
#include "plan_impl.h"
#include "reference/reference.h"

namespace moba::test {

// Sanitizers make everything 5 to 20 times as slow; the longest tests do less work under them.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// The same numbers on every machine, from a seed.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  std::uint64_t bits();
  std::int64_t integer(std::int64_t least, std::int64_t most);  // both included
  float uniform();                                              // [-1, 1)
  bool one_in(std::int64_t n) { return integer(1, n) == 1; }

 private:
  std::uint64_t state_;
};

// How a tensor lies in its memory, counted in elements.
struct Layout {
  std::int64_t gap = 0;     // free elements behind each innermost row
  bool swapped = false;     // the second dimension outermost
  std::int64_t offset = 0;  // of the first element from a multiple of 64 bytes
  bool tight = false;       // no guard behind it: the memory ends with the last element, so that ASan sees reads beyond
};

// A tensor with its memory. All memory that is not an element - gaps and guards - holds 0xff bytes (a NaN in every
// floating type), so that a stray read shows in a result and a stray write is found by surroundings_untouched().
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::vector<std::int64_t> shape, const Layout& layout = {});

  Tensor tensor();
  ConstTensor tensor() const;
  DType dtype() const { return shape_.dtype; }
  std::int64_t dim(int i) const { return shape_.shape[static_cast<std::size_t>(i)]; }

  template <class T>
  T& as(std::int64_t i, std::int64_t j = 0, std::int64_t l = 0) {
    return *reinterpret_cast<T*>(element(i, j, l));
  }
  template <class T>
  T as(std::int64_t i, std::int64_t j = 0, std::int64_t l = 0) const {
    return *reinterpret_cast<const T*>(const_cast<Array*>(this)->element(i, j, l));
  }
  // Floating types, widened and rounded.
  float get(std::int64_t i, std::int64_t j = 0, std::int64_t l = 0) const;
  void set(std::int64_t i, std::int64_t j, std::int64_t l, float value);

  // Elements = mean + amplitude * uniform noise.
  void fill(std::uint64_t seed, float amplitude = 1.0f, float mean = 0.0f);
  // Elements are whole numbers from -most to most: their sums and products are exact in float32.
  void fill_integers(std::uint64_t seed, std::int64_t most);
  void fill_value(float value);

  bool surroundings_untouched() const;
  bool untouched() const;  // nothing was ever written

  // All elements in row-major order, as raw bits: what "equal bit for bit" compares.
  std::vector<std::uint64_t> bits() const;
  std::vector<double> numbers() const;

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::byte* element(std::int64_t i, std::int64_t j, std::int64_t l);
  template <class F>
  void for_each(F f) const;

  Tensor shape_;  // no pointer in it
  std::size_t begin_ = 0;
  std::vector<Line> memory_;
};

// A problem in the form that tests state it in.
struct Case {
  std::string name;
  DType dtype = DType::f32;
  std::int64_t q_heads = 2, kv_heads = 1, head_dim = 16;
  std::vector<std::int64_t> q_lengths{64}, k_lengths{64};  // of the sequences; one: without cu_seqlens
  Config config{.block_size = 16, .top_k = 2};
  std::optional<Rope> rope = std::nullopt;
  Layout inputs{}, outputs{};
  float q_amplitude = 2.0f, k_amplitude = 1.0f;
  std::uint64_t seed = 1;

  Problem problem() const;
  std::int64_t total_q() const, total_k() const;
};
std::ostream& operator<<(std::ostream& stream, const Case& c);
// The name of a test that is made for each of several cases.
std::string case_name(const ::testing::TestParamInfo<Case>& info);

// The scale of the scores of a case, given or by default.
double scale_of(const Case& c);

Array starts(const std::vector<std::int64_t>& lengths);

struct Data {
  Array q, k, v;
  std::optional<Array> cu_seqlens_q, cu_seqlens_k;

  explicit Data(const Case& c);
  Inputs inputs() const;
};

// Results with their memory.
struct Attention {
  Array out, lse;
  explicit Attention(const Problem& p, const Layout& layout = {});
  Outputs outputs() { return {out.tensor(), lse.tensor()}; }
  std::vector<std::uint64_t> bits() const;
  bool surroundings_untouched() const { return out.surroundings_untouched() && lse.surroundings_untouched(); }
};

// Gradients with their memory.
struct Slopes {
  Array dq, dk, dv;
  explicit Slopes(const Problem& p, const Layout& layout = {});
  Gradients gradients() { return {dq.tensor(), dk.tensor(), dv.tensor()}; }
  std::vector<std::uint64_t> bits() const;
  bool surroundings_untouched() const;
};

struct Chosen {
  Array ids, counts, offsets, rows;
  explicit Chosen(const Plan& plan, const Layout& layout = {}, bool shared = false);
  Selection selection() { return {ids.tensor(), counts.tensor(), offsets.tensor(), rows.tensor()}; }
  std::vector<std::int32_t> row(std::int64_t token, std::int64_t head) const;  // without the -1
  void set_row(std::int64_t token, std::int64_t head, const std::vector<std::int32_t>& blocks);
  std::vector<std::int32_t> transpose() const;  // rows, as far as they are used
  bool surroundings_untouched() const;
};

// Ids of one's own for every row: blocks of its sequence at random, of the future too, from none of them to all slots.
void choose_anything(const Case& c, Chosen& chosen, std::uint64_t seed);

// A plan with a workspace of exactly its size, and the functions of moba/attention.h on it.
class Runner {
 public:
  Runner(const Problem& problem, const Options& options)
      : plan_(problem, options),
        workspace_(plan_.workspace_bytes()),
        backward_workspace_(plan_.backward_workspace_bytes()) {}
  const Plan& plan() const { return plan_; }

  Attention forward(const Inputs& inputs, const Layout& layout = {});
  Attention forward(const Inputs& inputs, Chosen& chosen, const Layout& layout = {});  // keeps its choice
  Attention dense(const Inputs& inputs, const Layout& layout = {});
  Attention attend(const Inputs& inputs, Chosen& chosen, const Layout& layout = {});
  Attention merge(std::vector<Attention>& partials, const Layout& layout = {});
  Slopes backward(const Inputs& inputs, Chosen& chosen, Attention& results, const Array& dout,
                  const Layout& layout = {});
  Slopes dense_backward(const Inputs& inputs, Attention& results, const Array& dout, const Layout& layout = {});
  Array pool(const Inputs& inputs, const Layout& layout = {});
  Chosen gate(const Inputs& inputs, const Array& centroids, const Layout& layout = {});
  Chosen select(const Inputs& inputs, const Layout& layout = {});
  void index(const Inputs& inputs, Chosen& chosen);
  std::pair<Array, Array> rope(const Inputs& inputs, const Layout& layout = {});

 private:
  Plan plan_;
  std::vector<std::byte> workspace_, backward_workspace_;
};

Options reference_options();
// Every way in which the cpu backend can compute with this type: each target, and each kind of bfloat16 products.
std::vector<Options> every_cpu_kernel(DType dtype, int threads = 2);
bool is_of_best_target(const Options& options);
// Those that a test goes through one by one: all, but under the thread sanitizer the best target alone, since how work
// is shared is the same code for every target. What draws problems at random draws from all.
std::vector<Options> cpu_kernels(DType dtype, int threads = 2);
std::string describe(const Options& options);

// What the reference's float64 functions take.
Call call_of(const Plan& plan, const Inputs& inputs);
reference::Rows attend_f64(Runner& run, const Inputs& inputs, Chosen& chosen);
reference::Rows dense_f64(Runner& run, const Inputs& inputs);
// docs/spec.md sections 2 and 7 written down once more, from ids: the judge of the reference. Null: dense.
reference::Rows brute_force(const Case& c, const Data& data, const Chosen* chosen);

// The relative error of a row that docs/spec.md section 10 allows.
double tolerance(DType dtype);
// Every row of `got` against float64: the relative error of out at most tolerance + extra, that of lse at most
// lse_bound + extra; zero, infinite and NaN where the reference is.
::testing::AssertionResult close(const Attention& got, const reference::Rows& expected, DType dtype, double extra = 0,
                                 double lse_bound = 1e-5);
// The bound on `extra` where scores are large: 4 * 2^-24 * the largest |scale| * sum |q_i k_i| of any pair.
double score_error(const Data& data, double scale);

// dout of a case: noise.
Array noise_dout(const Case& c);
// Float64 gradients of sum(dout * out) from `results`, or, where that is null, from what float64 forward gives;
// `chosen` null: dense. On a plan with a rope the inputs are rotated, as the steps take them.
reference::GradientRows backward_f64(Runner& run, const Inputs& inputs, Chosen* chosen, const Array& dout,
                                     const Attention* results = nullptr);
// Every gradient against float64: the error of a row at most `bound` times the norm of the row, or of an average row of
// the tensor where that is greater; that of the tensor at most `bound` times its norm; or what rounding leaves of terms
// that cancel, where that is greater still.
// `extra` is what the weights may be off by where scores are large.
double gradient_bound(DType dtype);
::testing::AssertionResult close(const Slopes& got, const reference::GradientRows& expected, const Data& data,
                                 const Array& dout, double scale, double bound, double extra = 0);

// What holds for every selection that gate makes: ascending, then -1, as many as there should be, the own block in.
::testing::AssertionResult well_formed(const Case& c, const Chosen& chosen);
// docs/spec.md section 5: equal to the reference's but for blocks whose float64 scores differ by less than the rounding
// of the float32 sums; and of blocks with equal centroids the more recent.
::testing::AssertionResult explained(const Case& c, const Inputs& inputs, const Array& centroids,
                                     const Chosen& expected, const Chosen& got);

}  // namespace moba::test
