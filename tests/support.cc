#include "support.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <numeric>
#include <set>

namespace moba::test {

namespace {

constexpr std::byte kPattern{0xff};
constexpr std::size_t kGuard = 128;

std::int64_t sum(const std::vector<std::int64_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
}

}  // namespace

std::uint64_t Random::bits() {  // splitmix64
  std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::int64_t Random::integer(std::int64_t least, std::int64_t most) {
  return least + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(most - least + 1));
}

float Random::uniform() { return static_cast<float>(bits() >> 40) * 0x1p-23f - 1.0f; }

Array::Array(DType dtype, std::vector<std::int64_t> dims, const Layout& layout) {
  shape_.dtype = dtype;
  shape_.rank = static_cast<int>(dims.size());
  std::vector<int> order(dims.size());  // dimensions, outermost first
  std::iota(order.begin(), order.end(), 0);
  if (layout.swapped && dims.size() >= 2) std::swap(order[0], order[1]);
  std::int64_t step = 1;
  for (auto i = order.rbegin(); i != order.rend(); ++i) {
    shape_.shape[*i] = dims[*i];
    shape_.stride[*i] = step;
    step = step * dims[*i] + (i == order.rbegin() ? layout.gap : 0);
  }
  std::int64_t elements = 1;  // from the first to the last
  for (std::size_t i = 0; i < dims.size(); ++i) elements += (dims[i] - 1) * shape_.stride[i];
  if (std::ranges::find(dims, 0) != dims.end()) elements = 0;
  const std::size_t size = size_in_bytes(dtype), bytes = static_cast<std::size_t>(elements) * size;
  const std::size_t front = kGuard + static_cast<std::size_t>(layout.offset) * size;
  const std::size_t lines = (front + bytes + (layout.tight ? 0 : kGuard) + 63) / 64;
  Line line;
  std::ranges::fill(line.bytes, kPattern);
  memory_.assign(lines, line);
  begin_ = layout.tight ? lines * 64 - bytes : front;
}

Tensor Array::tensor() {
  Tensor view = shape_;
  view.data = reinterpret_cast<std::byte*>(memory_.data()) + begin_;
  return view;
}

ConstTensor Array::tensor() const { return const_cast<Array*>(this)->tensor(); }

std::byte* Array::element(std::int64_t i, std::int64_t j, std::int64_t l) {
  const std::int64_t at = i * shape_.stride[0] + j * shape_.stride[1] + l * shape_.stride[2];
  return reinterpret_cast<std::byte*>(memory_.data()) + begin_ + static_cast<std::size_t>(at) * size_in_bytes(dtype());
}

template <class F>
void Array::for_each(F f) const {
  const auto dim_or_1 = [&](int i) { return i < shape_.rank ? dim(i) : 1; };
  for (std::int64_t i = 0; i < dim_or_1(0); ++i) {
    for (std::int64_t j = 0; j < dim_or_1(1); ++j) {
      for (std::int64_t l = 0; l < dim_or_1(2); ++l) f(i, j, l);
    }
  }
}

float Array::get(std::int64_t i, std::int64_t j, std::int64_t l) const {
  return load_float(const_cast<Array*>(this)->element(i, j, l), dtype(), 0);
}

void Array::set(std::int64_t i, std::int64_t j, std::int64_t l, float value) {
  store_float(element(i, j, l), dtype(), 0, value);
}

void Array::fill(std::uint64_t seed, float amplitude, float mean) {
  Random random(seed);
  for_each([&](auto i, auto j, auto l) { set(i, j, l, mean + amplitude * random.uniform()); });
}

void Array::fill_integers(std::uint64_t seed, std::int64_t most) {
  Random random(seed);
  for_each([&](auto i, auto j, auto l) { set(i, j, l, static_cast<float>(random.integer(-most, most))); });
}

void Array::fill_value(float value) {
  for_each([&](auto i, auto j, auto l) { set(i, j, l, value); });
}

bool Array::surroundings_untouched() const {
  std::vector<std::byte> bytes(memory_.size() * 64);
  std::memcpy(bytes.data(), memory_.data(), bytes.size());
  const std::size_t size = size_in_bytes(dtype());
  for_each([&](auto i, auto j, auto l) {
    const std::byte* at = const_cast<Array*>(this)->element(i, j, l);
    std::fill_n(bytes.begin() + (at - reinterpret_cast<const std::byte*>(memory_.data())), size, kPattern);
  });
  return std::ranges::all_of(bytes, [](std::byte b) { return b == kPattern; });
}

bool Array::untouched() const {
  return std::ranges::all_of(memory_, [](const Line& line) {
    return std::ranges::all_of(line.bytes, [](std::byte b) { return b == kPattern; });
  });
}

std::vector<std::uint64_t> Array::bits() const {
  std::vector<std::uint64_t> all;
  for_each([&](auto i, auto j, auto l) {
    std::uint64_t word = 0;
    std::memcpy(&word, const_cast<Array*>(this)->element(i, j, l), size_in_bytes(dtype()));
    all.push_back(word);
  });
  return all;
}

std::vector<double> Array::numbers() const {
  std::vector<double> all;
  for_each([&](auto i, auto j, auto l) { all.push_back(get(i, j, l)); });
  return all;
}

std::int64_t Case::total_q() const { return sum(q_lengths); }
std::int64_t Case::total_k() const { return sum(k_lengths); }

Problem Case::problem() const {
  Problem p;
  p.dtype = dtype;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.batch = std::ssize(q_lengths);
  p.total_q = total_q();
  p.total_k = total_k();
  if (p.batch > 0) {
    p.max_seqlen_q = std::ranges::max(q_lengths);
    p.max_seqlen_k = std::ranges::max(k_lengths);
  }
  p.config = config;
  p.rope = rope;
  return p;
}

std::ostream& operator<<(std::ostream& stream, const Case& c) {
  stream << c.name << " " << moba::name(c.dtype) << " Hq " << c.q_heads << " Hk " << c.kv_heads << " d " << c.head_dim
         << " B " << c.config.block_size << " k " << c.config.top_k << (c.config.causal ? " causal" : " not causal");
  for (std::size_t s = 0; s < c.q_lengths.size(); ++s) {
    stream << (s == 0 ? ", len " : ", ") << c.q_lengths[s] << "/" << c.k_lengths[s];
  }
  return stream << ", gap " << c.inputs.gap << (c.inputs.swapped ? " swapped" : "") << " offset " << c.inputs.offset
                << (c.inputs.tight ? " tight" : "") << " seed " << c.seed;
}

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  std::string text = info.param.name + " " + moba::name(info.param.dtype) + " " + std::to_string(info.index);
  for (char& letter : text) letter = std::isalnum(static_cast<unsigned char>(letter)) ? letter : '_';
  return text;
}

double scale_of(const Case& c) { return c.config.scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim))); }

Array starts(const std::vector<std::int64_t>& lengths) {
  Array cu(DType::i32, {std::ssize(lengths) + 1});
  std::int64_t total = 0;
  cu.as<std::int32_t>(0) = 0;
  for (std::int64_t s = 0; s < std::ssize(lengths); ++s) {
    cu.as<std::int32_t>(s + 1) = static_cast<std::int32_t>(total += lengths[s]);
  }
  return cu;
}

Data::Data(const Case& c)
    : q(c.dtype, {c.total_q(), c.q_heads, c.head_dim}, c.inputs),
      k(c.dtype, {c.total_k(), c.kv_heads, c.head_dim}, c.inputs),
      v(c.dtype, {c.total_k(), c.kv_heads, c.head_dim}, c.inputs) {
  q.fill(3 * c.seed, c.q_amplitude);
  k.fill(3 * c.seed + 1, c.k_amplitude);
  v.fill(3 * c.seed + 2, 1.0f, 0.25f);  // a mean: where values cancel, no relative error of their sum is small
  if (c.q_lengths.size() == 1) return;
  cu_seqlens_q = starts(c.q_lengths);
  cu_seqlens_k = starts(c.k_lengths);
}

Inputs Data::inputs() const {
  Inputs in{q.tensor(), k.tensor(), v.tensor(), {}, {}};
  if (cu_seqlens_q) in.cu_seqlens_q = std::as_const(*cu_seqlens_q).tensor();
  if (cu_seqlens_k) in.cu_seqlens_k = std::as_const(*cu_seqlens_k).tensor();
  return in;
}

Attention::Attention(const Problem& p, const Layout& layout)
    : out(p.dtype, {p.total_q, p.q_heads, p.head_dim}, layout), lse(DType::f32, {p.q_heads, p.total_q}, layout) {}

std::vector<std::uint64_t> Attention::bits() const {
  std::vector<std::uint64_t> all = out.bits(), more = lse.bits();
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

Slopes::Slopes(const Problem& p, const Layout& layout)
    : dq(p.dtype, {p.total_q, p.q_heads, p.head_dim}, layout),
      dk(p.dtype, {p.total_k, p.kv_heads, p.head_dim}, layout),
      dv(p.dtype, {p.total_k, p.kv_heads, p.head_dim}, layout) {}

std::vector<std::uint64_t> Slopes::bits() const {
  std::vector<std::uint64_t> all;
  for (const Array* array : {&dq, &dk, &dv}) {
    const std::vector<std::uint64_t> more = array->bits();
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

bool Slopes::surroundings_untouched() const {
  return dq.surroundings_untouched() && dk.surroundings_untouched() && dv.surroundings_untouched();
}

Chosen::Chosen(const Plan& plan, const Layout& layout, bool shared) {
  const Problem& p = plan.problem();
  const std::int64_t heads = shared ? p.kv_heads : p.q_heads;
  ids = Array(DType::i32, {p.total_q, heads, plan.slots()}, layout);
  counts = Array(DType::i32, {p.total_q, heads}, layout);
  offsets = Array(DType::i64, {p.kv_heads * plan.max_blocks() + 1});
  rows = Array(DType::i32, {p.total_q * p.q_heads * plan.slots()});
}

std::vector<std::int32_t> Chosen::row(std::int64_t token, std::int64_t head) const {
  std::vector<std::int32_t> blocks;
  for (std::int64_t slot = 0; slot < ids.dim(2) && ids.as<std::int32_t>(token, head, slot) != -1; ++slot) {
    blocks.push_back(ids.as<std::int32_t>(token, head, slot));
  }
  return blocks;
}

void Chosen::set_row(std::int64_t token, std::int64_t head, const std::vector<std::int32_t>& blocks) {
  for (std::int64_t slot = 0; slot < ids.dim(2); ++slot) {
    ids.as<std::int32_t>(token, head, slot) = slot < std::ssize(blocks) ? blocks[slot] : -1;
  }
}

std::vector<std::int32_t> Chosen::transpose() const {
  std::vector<std::int32_t> used;
  for (std::int64_t i = 0; i < offsets.as<std::int64_t>(offsets.dim(0) - 1); ++i)
    used.push_back(rows.as<std::int32_t>(i));
  return used;
}

bool Chosen::surroundings_untouched() const {
  return ids.surroundings_untouched() && counts.surroundings_untouched() && offsets.surroundings_untouched() &&
         rows.surroundings_untouched();
}

void choose_anything(const Case& c, Chosen& chosen, std::uint64_t seed) {
  Random random(seed);
  std::int64_t token = 0;
  for (std::size_t s = 0; s < c.q_lengths.size(); ++s) {
    const std::int64_t blocks = (c.k_lengths[s] + c.config.block_size - 1) / c.config.block_size;
    for (std::int64_t i = 0; i < c.q_lengths[s]; ++i, ++token) {
      for (std::int64_t head = 0; head < chosen.ids.dim(1); ++head) {
        std::set<std::int32_t> some;
        const std::int64_t wanted = random.integer(0, std::min(blocks, chosen.ids.dim(2)));
        while (std::ssize(some) < wanted) some.insert(static_cast<std::int32_t>(random.integer(0, blocks - 1)));
        chosen.set_row(token, head, {some.begin(), some.end()});
      }
    }
  }
}

Attention Runner::forward(const Inputs& inputs, const Layout& layout) {
  Attention result(plan_.problem(), layout);
  moba::forward(plan_, inputs, result.outputs(), workspace_);
  return result;
}

Attention Runner::forward(const Inputs& inputs, Chosen& chosen, const Layout& layout) {
  Attention result(plan_.problem(), layout);
  moba::forward(plan_, inputs, chosen.selection(), result.outputs(), workspace_);
  return result;
}

Slopes Runner::backward(const Inputs& inputs, Chosen& chosen, Attention& results, const Array& dout,
                        const Layout& layout) {
  Slopes slopes(plan_.problem(), layout);
  moba::backward(plan_, inputs, chosen.selection(), {results.out.tensor(), results.lse.tensor()}, dout.tensor(),
                 slopes.gradients(), backward_workspace_);
  return slopes;
}

Slopes Runner::dense_backward(const Inputs& inputs, Attention& results, const Array& dout, const Layout& layout) {
  Slopes slopes(plan_.problem(), layout);
  moba::dense_backward(plan_, inputs, {results.out.tensor(), results.lse.tensor()}, dout.tensor(), slopes.gradients(),
                       backward_workspace_);
  return slopes;
}

Attention Runner::dense(const Inputs& inputs, const Layout& layout) {
  Attention result(plan_.problem(), layout);
  moba::dense(plan_, inputs, result.outputs(), workspace_);
  return result;
}

Attention Runner::attend(const Inputs& inputs, Chosen& chosen, const Layout& layout) {
  Attention result(plan_.problem(), layout);
  moba::attend(plan_, inputs, chosen.selection(), result.outputs(), workspace_);
  return result;
}

Attention Runner::merge(std::vector<Attention>& partials, const Layout& layout) {
  Attention result(plan_.problem(), layout);
  std::vector<Outputs> views;
  views.reserve(partials.size());
  for (Attention& partial : partials) views.push_back(partial.outputs());
  moba::merge(plan_, views, result.outputs());
  return result;
}

Array Runner::pool(const Inputs& inputs, const Layout& layout) {
  const Problem& p = plan_.problem();
  Array centroids(p.dtype, {plan_.max_blocks(), p.kv_heads, p.head_dim}, layout);
  moba::pool(plan_, inputs, centroids.tensor(), workspace_);
  return centroids;
}

Chosen Runner::gate(const Inputs& inputs, const Array& centroids, const Layout& layout) {
  Chosen chosen(plan_, layout);
  moba::gate(plan_, inputs, centroids.tensor(), chosen.selection(), workspace_);
  return chosen;
}

Chosen Runner::select(const Inputs& inputs, const Layout& layout) {
  Chosen chosen(plan_, layout);
  moba::select(plan_, inputs, chosen.selection(), workspace_);
  return chosen;
}

void Runner::index(const Inputs& inputs, Chosen& chosen) { moba::index(plan_, inputs, chosen.selection(), workspace_); }

std::pair<Array, Array> Runner::rope(const Inputs& inputs, const Layout& layout) {
  const Problem& p = plan_.problem();
  std::pair<Array, Array> rotated{Array(p.dtype, {p.total_q, p.q_heads, p.head_dim}, layout),
                                  Array(p.dtype, {p.total_k, p.kv_heads, p.head_dim}, layout)};
  moba::rope(plan_, inputs, rotated.first.tensor(), rotated.second.tensor(), workspace_);
  return rotated;
}

Options reference_options() {
  Options options;
  options.backend = Backend::reference;
  return options;
}

std::vector<Options> every_cpu_kernel(DType dtype, int threads) {
  std::vector<Options> kernels;
  for (const std::string& target : cpu_targets()) {
    Options options;
    options.threads = threads;
    options.cpu_target = target;
    options.bf16_products = Bf16Products::widen;
    kernels.push_back(options);
    if (dtype != DType::bf16 || !target.starts_with("AVX3") || !bf16_support().available) continue;
    options.bf16_products = Bf16Products::dot;
    kernels.push_back(options);
  }
  return kernels;
}

bool is_of_best_target(const Options& options) { return options.cpu_target == cpu_targets().front(); }

std::vector<Options> cpu_kernels(DType dtype, int threads) {
  std::vector<Options> kernels = every_cpu_kernel(dtype, threads);
#if defined(__SANITIZE_THREAD__)
  std::erase_if(kernels, [](const Options& options) { return !is_of_best_target(options); });
#endif
  return kernels;
}

std::string describe(const Options& options) {
  if (options.backend == Backend::reference) return "reference";
  return options.cpu_target + (options.bf16_products == Bf16Products::dot ? " dot" : "") + ", " +
         std::to_string(options.threads) + " threads";
}

}  // namespace moba::test
