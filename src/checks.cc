#include "checks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/bf16_dot.h"
#include "cpu/targets.h"
#include "moba/error.h"
#include "parallel.h"
#include "plan_impl.h"

namespace moba {

namespace {

constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();
constexpr int kMaxThreads = 1024;

// "ARGUMENT: is WAS; allowed: ALLOWED"
template <class T>
[[noreturn]] void refuse(std::string_view argument, const T& was, std::string_view allowed) {
  std::string text(argument);
  if constexpr (std::is_arithmetic_v<T>) {
    text += ": is " + std::to_string(was);
  } else {
    text += ": is " + std::string(was);
  }
  throw Error(text + "; allowed: " + std::string(allowed));
}

void check_range(std::string_view argument, std::int64_t was, std::int64_t least,
                 std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
  if (was >= least && was <= most) return;
  refuse(argument, was,
         most == std::numeric_limits<std::int64_t>::max() ? std::to_string(least) + " or more"
                                                          : std::to_string(least) + " to " + std::to_string(most));
}

void check_positive(std::string_view argument, double was) {
  if (!(was > 0) || !std::isfinite(was)) refuse(argument, was, "finite numbers above 0");
}

// The product of the factors, or a refusal of `what` where it does not fit.
std::int64_t checked_product(std::string_view what, std::initializer_list<std::int64_t> factors) {
  std::int64_t product = 1;
  for (const std::int64_t factor : factors) {
    // 2^56: bytes of any dtype, and sums of several such sizes, still fit in 64 bits.
    if (__builtin_mul_overflow(product, factor, &product) || product > (std::int64_t{1} << 56)) {
      refuse(what, "more than 2^56", "sizes that fit in memory");
    }
  }
  return product;
}

void check_rope(Rope& rope, const Problem& problem) {
  if (rope.rotary_dim == 0) rope.rotary_dim = problem.head_dim;
  if (rope.style != RopeStyle::half_split && rope.style != RopeStyle::interleaved) {
    refuse("rope.style", static_cast<int>(rope.style), "half_split, interleaved");
  }
  if (rope.rotary_dim % 2 != 0 || rope.rotary_dim < 2 || rope.rotary_dim > problem.head_dim) {
    refuse("rope.rotary_dim", rope.rotary_dim,
           "even numbers from 2 to head_dim (" + std::to_string(problem.head_dim) + ")");
  }
  if (rope.cos.given() != rope.sin.given())
    refuse(rope.cos.given() ? "rope.sin" : "rope.cos", "not given", "both or none");
  if (rope.cos.given()) {
    check_tensor(rope.cos, {"rope.cos", DType::f32, {-1, rope.rotary_dim / 2}});
    check_tensor(rope.sin, {"rope.sin", DType::f32, {rope.cos.shape[0], rope.rotary_dim / 2}});
    if (rope.cos.shape[0] < problem.max_seqlen_k) {
      refuse("rope.cos", describe(rope.cos),
             "at least max_seqlen_k (" + std::to_string(problem.max_seqlen_k) + ") rows");
    }
    return;
  }
  // From 1 on no frequency is above 1 radian a token.
  if (!(rope.base >= 1) || !std::isfinite(rope.base)) refuse("rope.base", rope.base, "finite numbers from 1");
  switch (rope.scaling) {
    case RopeScaling::none:
      return;
    case RopeScaling::yarn:
      check_positive("rope.beta_slow", rope.beta_slow);
      check_positive("rope.beta_fast", rope.beta_fast);
      if (rope.beta_fast <= rope.beta_slow) refuse("rope.beta_fast", rope.beta_fast, "numbers above rope.beta_slow");
      if (rope.base <= 1) refuse("rope.base", rope.base, "numbers above 1 with yarn");
      if (rope.attention_factor) check_positive("rope.attention_factor", *rope.attention_factor);
      break;
    case RopeScaling::llama3:
      check_positive("rope.low_freq_factor", rope.low_freq_factor);
      check_positive("rope.high_freq_factor", rope.high_freq_factor);
      if (rope.high_freq_factor <= rope.low_freq_factor) {
        refuse("rope.high_freq_factor", rope.high_freq_factor, "numbers above rope.low_freq_factor");
      }
      break;
    case RopeScaling::linear:
      break;
    default:
      refuse("rope.scaling", static_cast<int>(rope.scaling), "none, linear, llama3, yarn");
  }
  if (!(rope.factor >= 1) || !std::isfinite(rope.factor)) refuse("rope.factor", rope.factor, "finite numbers from 1");
  check_positive("rope.original_max_position", rope.original_max_position);
}

void check_options(const Options& options, const Problem& problem) {
  if (options.backend != Backend::cpu && options.backend != Backend::reference) {
    refuse("options.backend", static_cast<int>(options.backend), "cpu, reference");
  }
  check_range("options.threads", options.threads, 0, kMaxThreads);
  if (cpu::find_target(options.cpu_target) == 0) {
    std::string names;
    for (const std::string& target : cpu_targets()) names += (names.empty() ? "" : ", ") + target;
    refuse("options.cpu_target", "'" + options.cpu_target + "'", names);
  }
  switch (options.bf16_products) {
    case Bf16Products::automatic:
    case Bf16Products::widen:
      return;
    case Bf16Products::dot:
      break;
    default:
      refuse("options.bf16_products", static_cast<int>(options.bf16_products), "automatic, widen, dot");
  }
  if (problem.dtype != DType::bf16)
    refuse("options.bf16_products", "dot", "automatic or widen, where dtype is not bf16");
  if (!cpu::bf16_dot_support().available || !MOBA_IS_AVX512(cpu::find_target(options.cpu_target))) {
    refuse("options.bf16_products", "dot", "automatic or widen on this processor and target, which has no AVX512_BF16");
  }
}

// Where the transpose is wrong: the list, for the message.
struct BadList {
  std::atomic<std::int64_t> first = std::numeric_limits<std::int64_t>::max();
  void report(std::int64_t list) {
    std::int64_t seen = first;
    while (list < seen && !first.compare_exchange_weak(seen, list)) {
    }
  }
  bool found() const { return first != std::numeric_limits<std::int64_t>::max(); }
};

}  // namespace

Problem checked(Problem p, const Options& options) {
  if (p.dtype != DType::f32 && p.dtype != DType::f16 && p.dtype != DType::bf16) {
    refuse("dtype", name(p.dtype), "f32, f16, bf16");
  }
  check_range("kv_heads", p.kv_heads, 1, kMaxRows);
  check_range("q_heads", p.q_heads, 1, kMaxRows);
  if (p.q_heads % p.kv_heads != 0)
    refuse("q_heads", p.q_heads, "multiples of kv_heads (" + std::to_string(p.kv_heads) + ")");
  check_range("head_dim", p.head_dim, 8, 256);
  check_range("batch", p.batch, 0, kMaxRows);
  check_range("total_q", p.total_q, 0);
  check_range("total_k", p.total_k, 0);
  if (p.batch == 0 && (p.total_q > 0 || p.total_k > 0)) refuse("batch", p.batch, "1 or more where there are tokens");
  check_range("max_seqlen_q", p.max_seqlen_q, 0);
  check_range("max_seqlen_k", p.max_seqlen_k, 0);
  p.max_seqlen_q = p.max_seqlen_q == 0 ? p.total_q : std::min(p.max_seqlen_q, p.total_q);
  p.max_seqlen_k = p.max_seqlen_k == 0 ? p.total_k : std::min(p.max_seqlen_k, p.total_k);
  check_range("config.block_size", p.config.block_size, 1);
  check_range("config.top_k", p.config.top_k, 1);
  // The backends fold log2(e) into it, in float32.
  constexpr double kMaxScale = std::numeric_limits<float>::max() / 1.5;
  if (p.config.scale && !(std::fabs(*p.config.scale) <= kMaxScale)) {
    refuse("config.scale", *p.config.scale, "finite numbers up to 2e38 either way");
  }
  if (!p.config.scale) p.config.scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));

  const std::int64_t group = p.q_heads / p.kv_heads;
  if (checked_product("total_q * q_heads / kv_heads", {p.total_q, group}) > kMaxRows) {
    refuse("total_q", p.total_q, "q_heads / kv_heads * total_q up to " + std::to_string(kMaxRows));
  }
  if (p.total_k > kMaxRows) refuse("total_k", p.total_k, "up to " + std::to_string(kMaxRows));
  checked_product("total_q * q_heads * head_dim", {p.total_q, p.q_heads, p.head_dim});
  checked_product("total_k * kv_heads * head_dim", {p.total_k, p.kv_heads, p.head_dim});
  const std::int64_t blocks = std::max<std::int64_t>(1, ceil_div(p.max_seqlen_k, p.config.block_size));
  checked_product("total_q * q_heads * min(top_k, blocks)", {p.total_q, p.q_heads, std::min(p.config.top_k, blocks)});
  if (p.rope) check_rope(*p.rope, p);
  check_options(options, p);
  return p;
}

void check_cu_seqlens(std::string_view argument, std::span<const std::int64_t> cu, std::int64_t batch,
                      std::int64_t total, std::int64_t longest) {
  const std::string a(argument);
  if (std::ssize(cu) != batch + 1)
    refuse(a, std::to_string(cu.size()) + " entries", std::to_string(batch + 1) + " (batch + 1)");
  if (cu[0] != 0) refuse(a + "[0]", cu[0], "0");
  for (std::int64_t s = 0; s < batch; ++s) {
    if (cu[s + 1] < cu[s]) {
      refuse(a + "[" + std::to_string(s + 1) + "]", cu[s + 1],
             "no less than the entry before it (" + std::to_string(cu[s]) + ")");
    }
    if (cu[s + 1] - cu[s] > longest) {
      refuse("length of sequence " + std::to_string(s) + " in " + a, cu[s + 1] - cu[s],
             "up to " + std::to_string(longest));
    }
  }
  if (cu[batch] != total)
    refuse(a + "[" + std::to_string(batch) + "]", cu[batch], "the total, " + std::to_string(total));
}

std::vector<std::int64_t> checked_cu_seqlens(std::string_view argument, const ConstTensor& tensor,
                                             const Plan::Impl& plan, std::int64_t total, std::int64_t longest) {
  const std::int64_t batch = plan.problem.batch;
  std::vector<std::int64_t> cu;
  if (!tensor.given()) {
    if (batch > 1) refuse(argument, "not given", "i32 [" + std::to_string(batch + 1) + "], unless batch is 1");
    cu = batch == 0 ? std::vector<std::int64_t>{0} : std::vector<std::int64_t>{0, total};
  } else {
    check_tensor(tensor, {argument, DType::i32, {batch + 1}});
    const std::int32_t* entries = static_cast<const std::int32_t*>(tensor.data);
    cu.assign(entries, entries + batch + 1);
  }
  check_cu_seqlens(argument, cu, batch, total, longest);
  return cu;
}

void check_tensor(const ConstTensor& t, const Expected& expected) {
  const auto wanted = [&] {
    std::string text = std::string(name(expected.dtype)) + " [";
    for (const std::int64_t dim : expected.shape) {
      text += (text.back() == '[' ? "" : ", ") + (dim < 0 ? std::string("any") : std::to_string(dim));
    }
    return text + "]";
  };
  const std::string a(expected.argument);
  if (!t.given()) refuse(a, "not given", wanted());
  if (t.device != Device::cpu) refuse(a + ".device", name(t.device), "cpu");
  const int rank = static_cast<int>(expected.shape.size());
  const bool shape_fits =
      t.rank == rank &&
      std::ranges::equal(expected.shape, std::span(t.shape).first(static_cast<std::size_t>(rank)),
                         [](std::int64_t want, std::int64_t is) { return want < 0 ? is >= 0 : want == is; });
  if (t.dtype != expected.dtype || !shape_fits) refuse(a, describe(t), wanted());
  if (std::ranges::find(t.shape.begin(), t.shape.begin() + rank, 0) != t.shape.begin() + rank) return;  // nothing in it
  if (t.data == nullptr) refuse(a, "a null pointer", "a pointer to " + wanted());
  if (reinterpret_cast<std::uintptr_t>(t.data) % size_in_bytes(t.dtype) != 0) {
    refuse(a, "not aligned", "addresses that are multiples of " + std::to_string(size_in_bytes(t.dtype)));
  }
  std::vector<int> order;  // the dimensions that are more than one element long
  const auto stride = [&](int i) { return a + ".stride[" + std::to_string(i) + "]"; };
  for (int i = 0; i < rank; ++i) {
    if (t.shape[i] <= 1) continue;  // never stepped over
    if (t.stride[i] < 0) refuse(stride(i), t.stride[i], "0 or more");
    if (i == rank - 1 && expected.last_stride_1 && t.stride[i] != 1) refuse(stride(i), t.stride[i], "1");
    checked_product(a, {t.stride[i], t.shape[i]});
    order.push_back(i);
  }
  if (!expected.output) return;
  std::ranges::sort(order, {}, [&](int i) { return t.stride[i]; });
  std::int64_t extent = 1;  // elements spanned by the dimensions so far
  for (const int dim : order) {
    if (t.stride[dim] < extent) {
      refuse(stride(dim), t.stride[dim],
             "at least " + std::to_string(extent) + ", so that no two elements share a place");
    }
    extent += (t.shape[dim] - 1) * t.stride[dim];
  }
}

Region::Region(std::string_view argument_name, const ConstTensor& tensor) : argument(argument_name) {
  if (!tensor.given()) return;
  std::int64_t last = 0;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] == 0) return;
    last += (tensor.shape[i] - 1) * tensor.stride[i];
  }
  begin = static_cast<const std::byte*>(tensor.data);
  end = begin + (last + 1) * static_cast<std::int64_t>(size_in_bytes(tensor.dtype));
}

Region::Region(std::string_view argument_name, Workspace workspace)
    : argument(argument_name), begin(workspace.data()), end(workspace.data() + workspace.size()) {}

void check_positions(const Call& call) {
  const std::optional<Rope>& rope = call.plan.problem.rope;
  if (!rope || !rope->cos.given()) return;
  for (std::size_t s = 0; s < call.sequences.size(); ++s) {
    if (call.sequences[s].q_len <= call.sequences[s].k_len) continue;
    refuse("length of sequence " + std::to_string(s) + " in cu_seqlens_q", call.sequences[s].q_len,
           "up to its length in cu_seqlens_k (" + std::to_string(call.sequences[s].k_len) +
               ") with a table of the caller's, which has no rows for positions before 0");
  }
}

void check_no_overlap(std::span<const Region> outputs, std::span<const Region> inputs) {
  const auto check = [](const Region& output, const Region& other) {
    if (output.begin == output.end || other.begin == other.end) return;
    const std::less<const std::byte*> before;
    if (before(output.begin, other.end) && before(other.begin, output.end)) {
      refuse(output.argument, "in memory that " + std::string(other.argument) + " spans", "memory of its own");
    }
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    for (const Region& input : inputs) check(outputs[i], input);
    for (std::size_t j = 0; j < i; ++j) check(outputs[i], outputs[j]);
  }
}

void check_workspace(Workspace workspace, std::size_t needed) {
  if (workspace.size() < needed) {
    refuse("workspace", std::to_string(workspace.size()) + " bytes",
           "at least plan.workspace_bytes(), " + std::to_string(needed));
  }
  if (workspace.data() == nullptr && needed > 0) refuse("workspace", "a null pointer", "a pointer");
}

void check_selection_rows(const Plan::Impl& plan, const Selection& selection, bool per_query_head) {
  const Problem& p = plan.problem;
  const std::int64_t given = selection.ids.rank == 3 ? selection.ids.shape[1] : p.q_heads;
  const std::int64_t heads = !per_query_head && given == p.kv_heads ? p.kv_heads : p.q_heads;
  check_tensor(selection.ids, {"selection.ids", DType::i32, {p.total_q, heads, plan.slots}, true});
  check_tensor(selection.counts, {"selection.counts", DType::i32, {p.total_q, heads}, true, false});
}

void check_selection_transpose(const Plan::Impl& plan, const Selection& selection) {
  const Problem& p = plan.problem;
  check_tensor(selection.offsets, {"selection.offsets", DType::i64, {p.kv_heads * plan.max_blocks + 1}, true});
  check_tensor(selection.rows, {"selection.rows", DType::i32, {p.total_q * p.q_heads * plan.slots}, true});
}

void check_ids(const Call& call, const Selection& selection) {
  constexpr std::int64_t kStep = 256;
  const ConstTensor ids = selection.ids;
  const std::int64_t tokens = call.plan.problem.total_q, heads = ids.shape[1], slots = call.plan.slots;
  const auto row_of = [&](std::int64_t token, std::int64_t head) {
    return std::span(static_cast<const std::int32_t*>(ids.data) + token * ids.stride[0] + head * ids.stride[1],
                     static_cast<std::size_t>(slots));
  };
  const auto good = [&](std::span<const std::int32_t> row, std::int64_t blocks) {
    std::int64_t last = -1;
    auto id = row.begin();
    for (; id != row.end() && *id != -1; last = *id++) {
      if (*id <= last || *id >= blocks) return false;
    }
    return std::all_of(id, row.end(), [](std::int32_t rest) { return rest == -1; });
  };
  const auto sequence_of = [&](std::int64_t token) {
    return std::ranges::partition_point(call.sequences,
                                        [&](const Sequence& s) { return s.q_begin + s.q_len <= token; });
  };
  BadList bad;
  parallel_for(call.plan.threads, (tokens + kStep - 1) / kStep, [&](std::int64_t task, int) {
    auto s = sequence_of(task * kStep);
    for (std::int64_t token = task * kStep; token < std::min(tokens, (task + 1) * kStep); ++token) {
      while (s->q_begin + s->q_len <= token) ++s;
      for (std::int64_t head = 0; head < heads; ++head) {
        if (!good(row_of(token, head), s->blocks)) bad.report(token * heads + head);
      }
    }
  });
  if (!bad.found()) return;
  const std::int64_t token = bad.first / heads, head = bad.first % heads;
  std::string text;
  const auto row = row_of(token, head);
  for (std::size_t i = 0; i < std::min<std::size_t>(row.size(), 16); ++i)
    text += (i > 0 ? ", " : "") + std::to_string(row[i]);
  refuse("selection.ids[" + std::to_string(token) + ", " + std::to_string(head) + "]",
         text + (slots > 16 ? ", ..." : ""),
         "ascending block ids below " + std::to_string(sequence_of(token)->blocks) + ", then -1");
}

void check_transpose(const Call& call, const Selection& selection) {
  const std::int64_t* offsets = static_cast<const std::int64_t*>(selection.offsets.data);
  const std::int32_t* rows = static_cast<const std::int32_t*>(selection.rows.data);
  const std::int64_t lists = selection.offsets.shape[0] - 1, group = call.plan.group;
  const std::string allowed =
      "what index() writes: ascending from 0 to at most " + std::to_string(selection.rows.shape[0]);
  if (offsets[0] != 0) refuse("selection.offsets[0]", offsets[0], allowed);
  for (std::int64_t list = 0; list < lists; ++list) {
    if (offsets[list + 1] < offsets[list] || offsets[list + 1] > selection.rows.shape[0]) {
      refuse("selection.offsets[" + std::to_string(list + 1) + "]", offsets[list + 1], allowed);
    }
  }
  BadList bad;
  parallel_for(call.plan.threads, lists, [&](std::int64_t list, int) {
    const std::int64_t begin = offsets[list], end = offsets[list + 1], block = list % call.plan.max_blocks;
    if (begin == end) return;
    const auto s = std::ranges::partition_point(call.sequences,
                                                [&](const Sequence& q) { return q.block_begin + q.blocks <= block; });
    if (s == call.sequences.end() || rows[begin] < s->q_begin * group ||
        rows[end - 1] >= (s->q_begin + s->q_len) * group ||
        std::adjacent_find(rows + begin, rows + end, std::greater_equal<>()) != rows + end) {
      bad.report(list);
    }
  });
  if (!bad.found()) return;
  refuse("selection.rows of key head " + std::to_string(bad.first / call.plan.max_blocks) + ", block " +
             std::to_string(bad.first % call.plan.max_blocks),
         "not ascending rows of the block's sequence", "what index() writes");
}

}  // namespace moba
