// Refusals of a call: tensors, sequences, memory, selections.
#include "checks.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>

#include "cuda/backend.h"
#include "parallel.h"
#include "plan_impl.h"
#include "refuse.h"

namespace moba {

namespace {

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

// Elements, 64 GiB: device kernels may count in 16-byte pieces of 32 bits from the start of a tensor.
constexpr std::int64_t kMaxDeviceStride = std::int64_t{1} << 35;

// The pointer of a cuda tensor must be of that device: a kernel that follows another ends the process's use of the GPU.
void check_device_memory(std::string_view argument, const void* pointer, int device_index) {
  const int is = cuda::device_of(pointer);
  if (is == device_index) return;
  refuse(argument, is < 0 ? "a pointer to memory that is no device's" : "memory of CUDA device " + std::to_string(is),
         "memory of CUDA device " + std::to_string(device_index));
}

}  // namespace

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
    check_tensor(plan, tensor, {argument, DType::i32, {batch + 1}});
    const std::int32_t* entries = static_cast<const std::int32_t*>(tensor.data);
    cu.assign(entries, entries + batch + 1);
  }
  check_cu_seqlens(argument, cu, batch, total, longest);
  return cu;
}

void check_tensor(const Plan::Impl& plan, const ConstTensor& tensor, const Expected& expected) {
  check_tensor(plan.device, plan.options.cuda_device, tensor, expected);
}

void check_tensor(Device device, int device_index, const ConstTensor& t, const Expected& expected) {
  const auto wanted = [&] {
    std::string text = std::string(name(expected.dtype)) + " [";
    for (const std::int64_t dim : expected.shape) {
      text += (text.back() == '[' ? "" : ", ") + (dim < 0 ? std::string("any") : std::to_string(dim));
    }
    return text + "]";
  };
  const std::string a(expected.argument);
  if (!t.given()) refuse(a, "not given", wanted());
  if (t.device != device) refuse(a + ".device", name(t.device), name(device));
  if (device == Device::cuda && t.device_index != device_index) {
    refuse(a + ".device_index", t.device_index, "options.cuda_device, " + std::to_string(device_index));
  }
  const int rank = static_cast<int>(expected.shape.size());
  const bool shape_fits =
      t.rank == rank &&
      std::ranges::equal(expected.shape, std::span(t.shape).first(static_cast<std::size_t>(rank)),
                         [](std::int64_t want, std::int64_t is) { return want < 0 ? is >= 0 : want == is; });
  if (t.dtype != expected.dtype || !shape_fits) refuse(a, describe(t), wanted());
  if (std::ranges::find(t.shape.begin(), t.shape.begin() + rank, 0) != t.shape.begin() + rank) return;  // nothing in it
  if (t.data == nullptr) refuse(a, "a null pointer", "a pointer to " + wanted());
  const bool vectors = device == Device::cuda && size_in_bytes(t.dtype) == 2;
  const std::size_t alignment = vectors ? 16 : size_in_bytes(t.dtype);
  if (reinterpret_cast<std::uintptr_t>(t.data) % alignment != 0) {
    refuse(a, "not aligned", "addresses that are multiples of " + std::to_string(alignment));
  }
  if (device == Device::cuda) check_device_memory(a, t.data, device_index);
  std::vector<int> order;  // the dimensions that are more than one element long
  const auto stride = [&](int i) { return a + ".stride[" + std::to_string(i) + "]"; };
  for (int i = 0; i < rank; ++i) {
    if (t.shape[i] <= 1) continue;  // never stepped over
    if (t.stride[i] < 0) refuse(stride(i), t.stride[i], "0 or more");
    if (vectors && i < rank - 1 && (t.stride[i] % 8 != 0 || t.stride[i] == 0 || t.stride[i] > kMaxDeviceStride)) {
      refuse(stride(i), t.stride[i], "multiples of 8 from 8 to 2^35 on cuda");
    }
    if (i == rank - 1 && expected.last_stride_1 && t.stride[i] != 1) refuse(stride(i), t.stride[i], "1");
    checked_product(a, {t.stride[i], t.shape[i]});
    order.push_back(i);
  }
  if (vectors && Region(a, t).end - Region(a, t).begin > 2 * kMaxDeviceStride) {
    refuse(a, "spread over more than 64 GiB", "tensors that span up to 64 GiB on cuda");
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

Region::Region(std::string_view argument_name, const ConstTensor& tensor) : argument(argument_name), view(tensor) {
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
  const Problem& p = call.plan.problem;
  if (call.plan.device != Device::cpu && !call.cu_seqlens_q.given() && !call.cu_seqlens_k.given() &&
      p.total_q > p.total_k) {
    refuse("total_q", p.total_q,
           "up to total_k (" + std::to_string(p.total_k) +
               ") with a table of the caller's, which has no rows for positions before 0");
  }
  for (std::size_t s = 0; s < call.sequences.size(); ++s) {
    if (call.sequences[s].q_len <= call.sequences[s].k_len) continue;
    refuse("length of sequence " + std::to_string(s) + " in cu_seqlens_q", call.sequences[s].q_len,
           "up to its length in cu_seqlens_k (" + std::to_string(call.sequences[s].k_len) +
               ") with a table of the caller's, which has no rows for positions before 0");
  }
}

namespace {

// Bytes from the first element to behind the last, where dimensions that step by multiples of `pitch` bytes do not
// count: modulo the pitch they stay where they are.
std::int64_t extent_within(const ConstTensor& t, std::int64_t pitch) {
  const auto size = static_cast<std::int64_t>(size_in_bytes(t.dtype));
  std::int64_t extent = size;
  for (int dim = 0; dim < t.rank; ++dim) {
    if (t.shape[dim] > 1 && t.stride[dim] * size % pitch != 0) extent += (t.shape[dim] - 1) * t.stride[dim] * size;
  }
  return extent;
}

// Whether there is a pitch, a stride of either, by which the two never meet.
bool interleaved(const Region& a, const Region& b) {
  if (!a.view.given() || !b.view.given()) return false;
  const auto address = [](const Region& r) { return reinterpret_cast<std::intptr_t>(r.begin); };
  for (const ConstTensor* t : {&a.view, &b.view}) {
    for (int dim = 0; dim < t->rank; ++dim) {
      if (t->shape[dim] <= 1 || t->stride[dim] <= 0) continue;
      const std::int64_t pitch = t->stride[dim] * static_cast<std::int64_t>(size_in_bytes(t->dtype));
      const std::int64_t distance = ((address(b) - address(a)) % pitch + pitch) % pitch;
      if (distance >= extent_within(a.view, pitch) && distance + extent_within(b.view, pitch) <= pitch) return true;
    }
  }
  return false;
}

}  // namespace

void check_no_overlap(std::span<const Region> outputs, std::span<const Region> inputs) {
  const auto check = [](const Region& output, const Region& other) {
    if (output.begin == output.end || other.begin == other.end) return;
    const std::less<const std::byte*> before;
    if (before(output.begin, other.end) && before(other.begin, output.end) && !interleaved(output, other)) {
      refuse(output.argument, "in memory that " + std::string(other.argument) + " spans",
             "memory of its own, or all of it between the rows of the other");
    }
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    for (const Region& input : inputs) check(outputs[i], input);
    for (std::size_t j = 0; j < i; ++j) check(outputs[i], outputs[j]);
  }
}

namespace {

// `needed` is the least limit for `what`, or 0 where the plan's is enough.
void check_fits(const Plan::Impl& plan, std::size_t needed, const std::string& what) {
  if (needed == 0) return;
  const std::size_t limit = plan.options.workspace_limit;
  refuse("options.workspace_limit", limit == 0 ? "not given" : std::to_string(limit) + " bytes",
         "at least " + std::to_string(needed) + " bytes for " + what + " of this problem");
}

}  // namespace

void check_index_fits(const Plan::Impl& plan) { check_fits(plan, plan.index_workspace_limit, "index and select"); }

void check_backward_fits(const Plan::Impl& plan) { check_fits(plan, plan.backward_workspace_limit, "backward"); }

void check_workspace(const Plan::Impl& plan, Workspace workspace, std::size_t needed, std::string_view what) {
  if (workspace.size() < needed) {
    refuse("workspace", std::to_string(workspace.size()) + " bytes",
           "at least plan." + std::string(what) + "(), " + std::to_string(needed));
  }
  if (workspace.data() == nullptr && needed > 0) refuse("workspace", "a null pointer", "a pointer");
  if (plan.device == Device::cuda) check_device_memory("workspace", workspace.data(), plan.options.cuda_device);
}

void check_outputs(const Plan::Impl& plan, const Outputs& outputs) {
  const Problem& p = plan.problem;
  check_tensor(plan, outputs.out, {"out", p.dtype, {p.total_q, p.q_heads, p.head_dim}, true});
  if (outputs.lse.given()) check_tensor(plan, outputs.lse, {"lse", DType::f32, {p.q_heads, p.total_q}, true, false});
}

void check_results(const Plan::Impl& plan, const ConstOutputs& results, const ConstTensor& dout) {
  const Problem& p = plan.problem;
  check_tensor(plan, results.out, {"results.out", p.dtype, {p.total_q, p.q_heads, p.head_dim}});
  check_tensor(plan, results.lse, {"results.lse", DType::f32, {p.q_heads, p.total_q}, false, false});
  check_tensor(plan, dout, {"dout", p.dtype, {p.total_q, p.q_heads, p.head_dim}});
}

void check_gradients(const Plan::Impl& plan, const Gradients& gradients) {
  const Problem& p = plan.problem;
  check_tensor(plan, gradients.dq, {"gradients.dq", p.dtype, {p.total_q, p.q_heads, p.head_dim}, true});
  check_tensor(plan, gradients.dk, {"gradients.dk", p.dtype, {p.total_k, p.kv_heads, p.head_dim}, true});
  check_tensor(plan, gradients.dv, {"gradients.dv", p.dtype, {p.total_k, p.kv_heads, p.head_dim}, true});
}

void check_centroids(const Plan::Impl& plan, const ConstTensor& centroids, bool output) {
  const Problem& p = plan.problem;
  check_tensor(plan, centroids, {"centroids", p.dtype, {plan.max_blocks, p.kv_heads, p.head_dim}, output});
}

namespace {

void check_row_ids(const Plan::Impl& plan, const Selection& selection) {
  const std::int64_t entries = plan.problem.total_q * plan.problem.q_heads * plan.slots;
  check_tensor(plan, selection.rows, {"selection.rows", DType::i32, {entries}, true});
}

}  // namespace

std::int64_t check_selection_ids(const Plan::Impl& plan, const Selection& selection, bool per_query_head) {
  const Problem& p = plan.problem;
  const std::int64_t given = selection.ids.rank == 3 ? selection.ids.shape[1] : p.q_heads;
  const std::int64_t heads = !per_query_head && given == p.kv_heads ? p.kv_heads : p.q_heads;
  check_tensor(plan, selection.ids, {"selection.ids", DType::i32, {p.total_q, heads, plan.slots}, true});
  return heads;
}

void check_selection_rows(const Plan::Impl& plan, const Selection& selection, bool per_query_head) {
  const Problem& p = plan.problem;
  const std::int64_t heads = check_selection_ids(plan, selection, per_query_head);
  check_tensor(plan, selection.counts, {"selection.counts", DType::i32, {p.total_q, heads}, true, false});
}

void check_kept_selection(const Plan::Impl& plan, const Selection& selection) {
  if (plan.device == Device::cpu) {
    check_selection_rows(plan, selection, true);
    return check_selection_transpose(plan, selection);
  }
  const Problem& p = plan.problem;
  check_selection_ids(plan, selection, true);
  if (selection.counts.given()) {
    check_tensor(plan, selection.counts, {"selection.counts", DType::i32, {p.total_q, p.q_heads}, true, false});
  }
  if (selection.offsets.given()) check_selection_offsets(plan, selection);
  if (selection.rows.given()) check_row_ids(plan, selection);
}

void check_backward_selection(const Plan::Impl& plan, const Selection& selection) {
  const bool on_host = plan.device == Device::cpu;
  if (!on_host || selection.ids.given()) check_selection_ids(plan, selection, false);
  if (selection.counts.given()) {
    check_tensor(plan, selection.counts, {"selection.counts", DType::i32, {plan.problem.total_q, -1}, false, false});
  }
  if (on_host || selection.offsets.given()) check_selection_offsets(plan, selection);
  if (on_host || selection.rows.given()) check_row_ids(plan, selection);
}

void check_selection_offsets(const Plan::Impl& plan, const Selection& selection) {
  const std::int64_t lists = plan.problem.kv_heads * plan.max_blocks;
  check_tensor(plan, selection.offsets, {"selection.offsets", DType::i64, {lists + 1}, true});
}

void check_selection_transpose(const Plan::Impl& plan, const Selection& selection) {
  check_selection_offsets(plan, selection);
  check_row_ids(plan, selection);
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
  if (is_stale(selection)) refuse("selection.offsets[0]", "-1, as long as it is not written for these ids", allowed);
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
