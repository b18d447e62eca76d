// The public functions: check, then hand one Call to the steps of the plan's backend.
#include <algorithm>
#include <vector>

#include "call.h"
#include "checks.h"
#include "moba/attention.h"
#include "moba/error.h"
#include "plan_impl.h"

namespace moba {

namespace {

std::vector<Sequence> sequences_of(const Plan::Impl& plan, const Inputs& inputs) {
  const Problem& p = plan.problem;
  const auto q = checked_cu_seqlens("cu_seqlens_q", inputs.cu_seqlens_q, plan, p.total_q, p.max_seqlen_q);
  const auto k = checked_cu_seqlens("cu_seqlens_k", inputs.cu_seqlens_k, plan, p.total_k, p.max_seqlen_k);
  std::vector<Sequence> sequences(static_cast<std::size_t>(p.batch));
  std::int64_t block = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const std::int64_t k_len = k[s + 1] - k[s], blocks = ceil_div(k_len, p.config.block_size);
    sequences[s] = {q[s], q[s + 1] - q[s], k[s], k_len, block, blocks};
    block += blocks;
  }
  return sequences;
}

Outputs tidy(const Outputs& outputs) { return {tidy(outputs.out), tidy(outputs.lse)}; }

Selection tidy(const Selection& s) { return {tidy(s.ids), tidy(s.counts), tidy(s.offsets), tidy(s.rows)}; }

// What a function reads of its inputs.
enum Reads : unsigned { kQ = 1, kK = 2, kV = 4 };

// A table of the batch that only the device can read, or the one sequence that stands for it.
void check_device_cu_seqlens(std::string_view argument, const ConstTensor& tensor, const Plan::Impl& plan,
                             std::int64_t total, std::int64_t longest) {
  if (tensor.given()) {
    check_tensor(plan, tensor, {argument, DType::i32, {plan.problem.batch + 1}});
  } else {
    checked_cu_seqlens(argument, tensor, plan, total, longest);
  }
}

// The workspace of a call: how much of it is needed, by which name of Plan's, and how much of that is scratch.
struct Needs {
  std::size_t bytes;
  std::string_view name;
  std::size_t scratch_bytes;
};
Needs forward_needs(const Plan& plan) { return {plan.workspace_bytes(), "workspace_bytes", plan.impl().scratch_bytes}; }
Needs backward_needs(const Plan& plan) {
  return {plan.backward_workspace_bytes(), "backward_workspace_bytes", plan.impl().backward_scratch_bytes};
}

Call make_call(const Plan& given, const Inputs& inputs, unsigned reads, Workspace workspace, Stream stream,
               const Needs& needs) {
  const Plan::Impl& plan = given.impl();
  const Problem& p = plan.problem;
  if (reads & kQ) check_tensor(plan, inputs.q, {"q", p.dtype, {p.total_q, p.q_heads, p.head_dim}});
  if (reads & kK) check_tensor(plan, inputs.k, {"k", p.dtype, {p.total_k, p.kv_heads, p.head_dim}});
  if (reads & kV) check_tensor(plan, inputs.v, {"v", p.dtype, {p.total_k, p.kv_heads, p.head_dim}});
  check_workspace(plan, workspace, needs.bytes, needs.name);
  Call call{plan, tidy(inputs.q), tidy(inputs.k), tidy(inputs.v), {}, {}, {}, {}, stream};
  if (plan.device == Device::cpu) {
    call.sequences = sequences_of(plan, inputs);
  } else {
    check_device_cu_seqlens("cu_seqlens_q", inputs.cu_seqlens_q, plan, p.total_q, p.max_seqlen_q);
    check_device_cu_seqlens("cu_seqlens_k", inputs.cu_seqlens_k, plan, p.total_k, p.max_seqlen_k);
    call.cu_seqlens_q = inputs.cu_seqlens_q;
    call.cu_seqlens_k = inputs.cu_seqlens_k;
  }
  call.scratch = from_aligned(workspace).first(needs.scratch_bytes);
  return call;
}
Call make_call(const Plan& plan, const Inputs& inputs, unsigned reads, Workspace workspace, Stream stream) {
  return make_call(plan, inputs, reads, workspace, stream, forward_needs(plan));
}

// Everything a call reads, and the plan's own tables, for the overlap check.
std::vector<Region> regions(const Plan& plan, const Inputs& inputs, unsigned reads) {
  std::vector<Region> all{{"cu_seqlens_q", inputs.cu_seqlens_q}, {"cu_seqlens_k", inputs.cu_seqlens_k}};
  if (const auto& rope = plan.problem().rope) {
    all.insert(all.end(), {{"rope.cos", rope->cos}, {"rope.sin", rope->sin}});
  }
  if (reads & kQ) all.emplace_back("q", inputs.q);
  if (reads & kK) all.emplace_back("k", inputs.k);
  if (reads & kV) all.emplace_back("v", inputs.v);
  return all;
}

// Everything that is given of a selection: what forward and select write, and gradients may not overlap.
std::vector<Region> selection_regions(const Selection& selection) {
  return {{"selection.ids", selection.ids},
          {"selection.counts", selection.counts},
          {"selection.offsets", selection.offsets},
          {"selection.rows", selection.rows}};
}

// The pieces of the workspace behind the scratch, in the order of their use.
class Stack {
 public:
  Stack(const Call& call, const Problem& problem)
      : next_(call.scratch.data() + aligned(call.scratch.size())),
        problem_(problem),
        device_(call.plan.device),
        device_index_(call.plan.options.cuda_device) {}
  Tensor tensor(std::size_t bytes, std::int64_t rows, std::int64_t heads) {
    return Tensor(take(bytes).data(), problem_.dtype, {rows, heads, problem_.head_dim}, device_, device_index_);
  }
  std::span<std::byte> take(std::size_t bytes) {
    std::byte* piece = next_;
    next_ += bytes;
    return {piece, bytes};
  }

 private:
  std::byte* next_;
  const Problem& problem_;
  Device device_;
  int device_index_;
};

// The memory of rotated copies of q and k, if the plan has a rope.
Intermediates take_rotated(const Plan& plan, Stack& stack) {
  const Problem& p = plan.problem();
  if (!p.rope) return {};
  Intermediates memory;
  memory.q_rotated = stack.tensor(plan.impl().q_rotated_bytes, p.total_q, p.q_heads);
  memory.k_rotated = stack.tensor(plan.impl().k_rotated_bytes, p.total_k, p.kv_heads);
  return memory;
}

// What forward and dense check. `kept` is the selection that forward keeps, or null.
Call checked_attention(const Plan& plan, const Inputs& inputs, const Selection* kept, const Outputs& outputs,
                       Workspace workspace, Stream stream) {
  Call call = make_call(plan, inputs, kQ | kK | kV, workspace, stream);
  check_outputs(plan.impl(), outputs);
  std::vector<Region> written{{"out", outputs.out}, {"lse", outputs.lse}, {"workspace", workspace}};
  if (kept != nullptr) {
    check_kept_selection(plan.impl(), *kept);
    for (const Region& region : selection_regions(*kept)) written.push_back(region);
  }
  check_no_overlap(written, regions(plan, inputs, kQ | kK | kV));
  check_positions(call);
  return call;
}

bool is_empty(const Selection& s) {
  return !s.ids.given() && !s.counts.given() && !s.offsets.given() && !s.rows.given();
}

// forward, into `kept` or, where that is null, a selection in the workspace.
void forward_into(const Plan& plan, const Inputs& inputs, const Selection* kept, const Outputs& outputs,
                  Workspace workspace, Stream stream) {
  const bool is_dense = plan.forward_is_dense();
  if (is_dense && kept != nullptr && is_empty(*kept)) kept = nullptr;  // there is nothing to choose
  const Call call = checked_attention(plan, inputs, kept, outputs, workspace, stream);
  Stack stack(call, plan.problem());
  Intermediates memory = take_rotated(plan, stack);
  if (is_dense) {
    if (kept != nullptr) plan.impl().steps->choose_all(call, tidy(*kept));
    return plan.impl().steps->dense(rotated(call, memory), tidy(outputs));
  }
  memory.centroids = stack.tensor(plan.impl().centroids_bytes, plan.max_blocks(), plan.problem().kv_heads);
  if (kept != nullptr) {
    memory.selection = tidy(*kept);
  } else if (plan.impl().selection_bytes > 0) {
    memory.selection = make_selection(plan, stack.take(plan.impl().selection_bytes));
  }
  plan.impl().steps->forward(call, memory, tidy(outputs));
}

// What the backward functions check. `selection` is null where all keys are attended to.
Call checked_backward(const Plan& plan, const Inputs& inputs, const Selection* selection, const ConstOutputs& results,
                      const ConstTensor& dout, const Gradients& gradients, Workspace workspace, Stream stream) {
  check_backward_fits(plan.impl());
  Call call = make_call(plan, inputs, kQ | kK | kV, workspace, stream, backward_needs(plan));
  check_results(plan.impl(), results, dout);
  check_gradients(plan.impl(), gradients);
  std::vector<Region> read = regions(plan, inputs, kQ | kK | kV);
  read.insert(read.end(), {{"results.out", results.out}, {"results.lse", results.lse}, {"dout", dout}});
  if (selection != nullptr) {
    check_backward_selection(plan.impl(), *selection);
    for (const Region& region : selection_regions(*selection)) read.push_back(region);
  }
  const Region written[] = {{"gradients.dq", gradients.dq},
                            {"gradients.dk", gradients.dk},
                            {"gradients.dv", gradients.dv},
                            {"workspace", workspace}};
  check_no_overlap(written, read);
  check_positions(call);
  if (selection != nullptr && call.plan.device == Device::cpu) check_transpose(call, *selection);
  return call;
}

// Where forward was dense there is none, unless the caller made one, for attend.
bool reads_selection(const Plan& plan, const Selection& selection) {
  if (!plan.forward_is_dense()) return true;
  if (plan.impl().device == Device::cuda) return selection.ids.given();
  if (!selection.offsets.given()) return false;
  check_selection_transpose(plan.impl(), selection);
  return !is_stale(selection);
}

// backward over the selection, or, where that is null, over all keys.
void backward_over(const Plan& plan, const Inputs& inputs, const Selection* selection, const ConstOutputs& results,
                   const ConstTensor& dout, const Gradients& gradients, Workspace workspace, Stream stream) {
  const Call given = checked_backward(plan, inputs, selection, results, dout, gradients, workspace, stream);
  Stack stack(given, plan.problem());
  const Call call = rotated(given, take_rotated(plan, stack));
  const Cotangents cotangents{tidy(results.out), tidy(results.lse), tidy(dout)};
  const Gradients into{tidy(gradients.dq), tidy(gradients.dk), tidy(gradients.dv)};
  const Steps& steps = *plan.impl().steps;
  if (selection == nullptr) return steps.dense_backward(call, cotangents, into);
  steps.backward(call, tidy(*selection), cotangents, into);
}

}  // namespace

void forward(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Workspace workspace, Stream stream) {
  forward_into(plan, inputs, nullptr, outputs, workspace, stream);
}

void forward(const Plan& plan, const Inputs& inputs, const Selection& selection, const Outputs& outputs,
             Workspace workspace, Stream stream) {
  forward_into(plan, inputs, &selection, outputs, workspace, stream);
}

void dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Workspace workspace, Stream stream) {
  const Call call = checked_attention(plan, inputs, nullptr, outputs, workspace, stream);
  Stack stack(call, plan.problem());
  plan.impl().steps->dense(rotated(call, take_rotated(plan, stack)), tidy(outputs));
}

void backward(const Plan& plan, const Inputs& inputs, const Selection& selection, const ConstOutputs& results,
              const ConstTensor& dout, const Gradients& gradients, Workspace workspace, Stream stream) {
  backward_over(plan, inputs, reads_selection(plan, selection) ? &selection : nullptr, results, dout, gradients,
                workspace, stream);
}

void dense_backward(const Plan& plan, const Inputs& inputs, const ConstOutputs& results, const ConstTensor& dout,
                    const Gradients& gradients, Workspace workspace, Stream stream) {
  backward_over(plan, inputs, nullptr, results, dout, gradients, workspace, stream);
}

Selection make_selection(const Plan& plan, std::span<std::byte> memory, bool shared) {
  const Problem& p = plan.problem();
  if (memory.size() < plan.selection_bytes(shared)) {
    throw Error("memory: is " + std::to_string(memory.size()) + " bytes; allowed: at least plan.selection_bytes(), " +
                std::to_string(plan.selection_bytes(shared)));
  }
  if (memory.data() == nullptr) throw Error("memory: is a null pointer; allowed: a pointer");
  if (reinterpret_cast<std::uintptr_t>(memory.data()) % alignof(std::int64_t) != 0) {
    throw Error("memory: is not aligned; allowed: addresses that are multiples of 8");
  }
  std::byte* next = memory.data();
  const auto take = [&](DType dtype, std::initializer_list<std::int64_t> shape) {
    const Tensor tensor(next, dtype, shape, plan.impl().device, plan.options().cuda_device);
    std::size_t bytes = size_in_bytes(dtype);
    for (const std::int64_t dim : shape) bytes *= static_cast<std::size_t>(dim);
    next += aligned(bytes);
    return tensor;
  };
  const std::int64_t heads = shared ? p.kv_heads : p.q_heads, slots = plan.slots();
  Selection selection;
  selection.ids = take(DType::i32, {p.total_q, heads, slots});
  selection.counts = take(DType::i32, {p.total_q, heads});
  selection.offsets = take(DType::i64, {p.kv_heads * plan.max_blocks() + 1});
  selection.rows = take(DType::i32, {p.total_q * p.q_heads * slots});
  if (plan.impl().device == Device::cpu) mark_stale(selection);
  return selection;
}

void rope(const Plan& plan, const Inputs& inputs, const Tensor& q_rotated, const Tensor& k_rotated, Workspace workspace,
          Stream stream) {
  const Problem& p = plan.problem();
  if (!p.rope) throw Error("plan: its problem has no rope; allowed: plans made with Problem::rope");
  const Call call = make_call(plan, inputs, kQ | kK, workspace, stream);
  check_tensor(plan.impl(), q_rotated, {"q_rotated", p.dtype, {p.total_q, p.q_heads, p.head_dim}, true});
  check_tensor(plan.impl(), k_rotated, {"k_rotated", p.dtype, {p.total_k, p.kv_heads, p.head_dim}, true});
  const Region written[] = {{"q_rotated", q_rotated}, {"k_rotated", k_rotated}, {"workspace", workspace}};
  check_no_overlap(written, regions(plan, inputs, kQ | kK));
  check_positions(call);
  plan.impl().steps->rope(call, tidy(q_rotated), tidy(k_rotated));
}

void pool(const Plan& plan, const Inputs& inputs, const Tensor& centroids, Workspace workspace, Stream stream) {
  const Call call = make_call(plan, inputs, kK, workspace, stream);
  check_centroids(plan.impl(), centroids, true);
  const Region written[] = {{"centroids", centroids}, {"workspace", workspace}};
  check_no_overlap(written, regions(plan, inputs, kK));
  plan.impl().steps->pool(call, tidy(centroids));
}

void gate(const Plan& plan, const Inputs& inputs, const ConstTensor& centroids, const Selection& selection,
          Workspace workspace, Stream stream) {
  const Call call = make_call(plan, inputs, kQ, workspace, stream);
  check_centroids(plan.impl(), centroids, false);
  check_selection_rows(plan.impl(), selection, true);
  if (selection.offsets.given()) check_selection_transpose(plan.impl(), selection);
  const Region written[] = {{"selection.ids", selection.ids},
                            {"selection.counts", selection.counts},
                            {"selection.offsets", selection.offsets},
                            {"workspace", workspace}};
  std::vector<Region> read = regions(plan, inputs, kQ);
  read.emplace_back("centroids", centroids);
  check_no_overlap(written, read);
  if (selection.offsets.given() && call.plan.device == Device::cpu) mark_stale(selection);
  plan.impl().steps->gate(call, tidy(centroids), tidy(selection));
}

void index(const Plan& plan, const Inputs& inputs, const Selection& selection, Workspace workspace, Stream stream) {
  check_index_fits(plan.impl());
  const Call call = make_call(plan, inputs, 0, workspace, stream);
  check_selection_rows(plan.impl(), selection, false);
  check_selection_transpose(plan.impl(), selection);
  const Region written[] = {{"selection.counts", selection.counts},
                            {"selection.offsets", selection.offsets},
                            {"selection.rows", selection.rows},
                            {"workspace", workspace}};
  std::vector<Region> read = regions(plan, inputs, 0);
  read.emplace_back("selection.ids", selection.ids);
  check_no_overlap(written, read);
  if (call.plan.device == Device::cpu) check_ids(call, tidy(selection));
  plan.impl().steps->index(call, tidy(selection));
}

void select(const Plan& plan, const Inputs& inputs, const Selection& selection, Workspace workspace, Stream stream) {
  check_index_fits(plan.impl());
  const Problem& p = plan.problem();
  const Call call = make_call(plan, inputs, kQ | kK, workspace, stream);
  check_selection_rows(plan.impl(), selection, true);
  check_selection_transpose(plan.impl(), selection);
  std::vector<Region> written = selection_regions(selection);
  written.emplace_back("workspace", workspace);
  check_no_overlap(written, regions(plan, inputs, kQ | kK));
  Stack stack(call, p);
  const Tensor centroids = stack.tensor(plan.impl().centroids_bytes, plan.max_blocks(), p.kv_heads);
  plan.impl().steps->pool(call, centroids);
  plan.impl().steps->gate(call, centroids, tidy(selection));
  plan.impl().steps->index(call, tidy(selection));
}

void attend(const Plan& plan, const Inputs& inputs, const Selection& selection, const Outputs& outputs,
            Workspace workspace, Stream stream) {
  const Call call = make_call(plan, inputs, kQ | kK | kV, workspace, stream);
  const bool on_host = call.plan.device == Device::cpu;  // and there the transpose is read, elsewhere the ids
  if (on_host) {
    check_selection_transpose(plan.impl(), selection);
  } else {
    check_selection_ids(plan.impl(), selection, false);
  }
  check_outputs(plan.impl(), outputs);
  const Region written[] = {{"out", outputs.out}, {"lse", outputs.lse}, {"workspace", workspace}};
  std::vector<Region> read = regions(plan, inputs, kQ | kK | kV);
  if (on_host) {
    read.emplace_back("selection.offsets", selection.offsets);
    read.emplace_back("selection.rows", selection.rows);
  } else {
    read.emplace_back("selection.ids", selection.ids);
  }
  check_no_overlap(written, read);
  if (on_host) check_transpose(call, selection);
  plan.impl().steps->attend(call, tidy(selection), tidy(outputs));
}

void merge(const Plan& plan, std::span<const Outputs> partials, const Outputs& outputs, Stream stream) {
  const Problem& p = plan.problem();
  std::vector<Region> read;
  std::vector<Outputs> tidied;
  for (const Outputs& partial : partials) {
    tidied.push_back(tidy(partial));
    check_tensor(plan.impl(), partial.out, {"partial out", p.dtype, {p.total_q, p.q_heads, p.head_dim}});
    check_tensor(plan.impl(), partial.lse, {"partial lse", DType::f32, {p.q_heads, p.total_q}, false, false});
    read.emplace_back("partial out", partial.out);
    read.emplace_back("partial lse", partial.lse);
  }
  check_outputs(plan.impl(), outputs);
  const Region written[] = {{"out", outputs.out}, {"lse", outputs.lse}};
  check_no_overlap(written, read);
  const Call call{plan.impl(), {}, {}, {}, {}, {}, {}, {}, stream};
  plan.impl().steps->merge(call, tidied, tidy(outputs));
}

}  // namespace moba
