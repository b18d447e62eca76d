#include "resident.h"

#include <algorithm>

#include "cuda/launch.h"

namespace moba::test {

namespace {

// The elements of a tensor without gaps.
Bytes bytes_of(const Array& x) {
  const ConstTensor t = x.tensor();
  std::size_t size = size_in_bytes(t.dtype);
  for (int i = 0; i < t.rank; ++i) size *= static_cast<std::size_t>(t.shape[i]);
  const auto* const first = static_cast<const std::byte*>(t.data);
  return {first, first + size};
}

// Not poison, which would be the mark of offsets that are out of date.
Array zeros(Array offsets) {
  for (std::int64_t i = 0; i < offsets.dim(0); ++i) offsets.as<std::int64_t>(i) = 0;
  return offsets;
}

}  // namespace

std::optional<Chosen> Choice::chosen() const {
  if (!sink) return std::nullopt;
  Chosen made(Plan(given.c.problem(), reference_options()), Layout{.gap = 1}, true);
  for (std::int64_t token = 0; token < made.ids.dim(0); ++token) {
    const auto own = static_cast<std::int32_t>(token / given.c.config.block_size);
    for (std::int64_t head = 0; head < made.ids.dim(1); ++head) {
      made.set_row(token, head, own == 0 ? std::vector<std::int32_t>{0} : std::vector<std::int32_t>{0, own});
    }
  }
  return made;
}

std::vector<Choice> small_choices() {
  std::vector<Choice> all;
  for (const auto& [d, b] : {std::pair{64, 32}, {128, 128}, {128, 144}, {96, 48}}) {
    for (const bool causal : {true, false}) {
      Case c{.name = "trained", .dtype = causal ? DType::bf16 : DType::f16, .q_heads = 6, .kv_heads = 3, .head_dim = d};
      c.q_lengths = {1, 600, 0, 90, 200, 3, 400};
      c.k_lengths = {1, 700, 5, 70, 200, 0, 400};
      c.config = {.block_size = b, .top_k = 4, .causal = causal};
      if (causal) c.rope = Rope{};
      c.seed = run_seed();
      all.push_back({Given(c), false});
    }
  }
  return all;
}

Choice long_choice(std::int64_t tokens, std::int64_t d, std::int64_t block_size, bool sink) {
  Case c{.name = "long", .dtype = DType::bf16, .q_heads = 8, .kv_heads = 2, .head_dim = d, .seed = run_seed()};
  c.q_lengths = c.k_lengths = {tokens};
  c.config = {.block_size = block_size, .top_k = 3};
  return {Given(c), sink};
}

Bytes Written::bytes(cudaStream_t stream) const {
  Array read = nothing_;
  device_.download(read.tensor().data, stream);
  MOBA_CUDA(cudaStreamSynchronize(stream));
  return bytes_of(read);
}

ResidentTraining::ResidentTraining(const Choice& choice, const Options& options, Keeps kept)
    : plan(choice.given.c.problem(), options),
      gated(!choice.sink),
      keeps(kept),
      q(choice.given.data.q.tensor()),
      k(choice.given.data.k.tensor()),
      v(choice.given.data.v.tensor()),
      dout(choice.given.dout.tensor()),
      out(Attention(plan.problem()).out),
      lse(Attention(plan.problem()).lse),
      ids(choice.chosen().value_or(Chosen(plan)).ids),
      counts(Chosen(plan).counts),
      offsets(zeros(Chosen(plan).offsets)),
      rows(Chosen(plan).rows),
      dq(Slopes(plan.problem()).dq),
      dk(Slopes(plan.problem()).dk),
      dv(Slopes(plan.problem()).dv),
      workspace(std::max(plan.workspace_bytes(), plan.backward_workspace_bytes())) {
  const Data& data = choice.given.data;
  if (!data.cu_seqlens_q) return;
  cu_seqlens_q.emplace(std::as_const(*data.cu_seqlens_q).tensor());
  cu_seqlens_k.emplace(std::as_const(*data.cu_seqlens_k).tensor());
}

Inputs ResidentTraining::inputs() const {
  Inputs inputs{q.tensor(), k.tensor(), v.tensor(), {}, {}};
  if (cu_seqlens_q) inputs.cu_seqlens_q = cu_seqlens_q->tensor(), inputs.cu_seqlens_k = cu_seqlens_k->tensor();
  return inputs;
}

Selection ResidentTraining::selection() const {
  if (keeps == Keeps::ids) return {ids.tensor(), {}, {}, {}};
  return {ids.tensor(), counts.tensor(), offsets.tensor(), rows.tensor()};
}

void ResidentTraining::upload(const Given& given, cudaStream_t stream) const {
  const Data& data = given.data;
  q.upload(data.q.tensor().data, stream);
  k.upload(data.k.tensor().data, stream);
  v.upload(data.v.tensor().data, stream);
  if (cu_seqlens_q) cu_seqlens_q->upload(data.cu_seqlens_q->tensor().data, stream);
  if (cu_seqlens_k) cu_seqlens_k->upload(data.cu_seqlens_k->tensor().data, stream);
  dout.upload(given.dout.tensor().data, stream);
  forget(stream);
}

void ResidentTraining::forget(cudaStream_t stream) const {
  for (const Written* written : {&out, &lse, &ids, &counts, &offsets, &rows, &dq, &dk, &dv}) written->forget(stream);
  workspace.poison(stream);
  MOBA_CUDA(cudaStreamSynchronize(stream));
}

void ResidentTraining::forward_pass(bool all_keys, const Selection& kept, const Outputs& outputs, Workspace memory,
                                    cudaStream_t stream) const {
  if (all_keys) return dense(plan, inputs(), outputs, memory, {stream});
  if (gated) return forward(plan, inputs(), kept, outputs, memory, {stream});
  attend(plan, inputs(), kept, outputs, memory, {stream});
}

void ResidentTraining::backward_pass(bool all_keys, const Selection& kept, const ConstOutputs& results,
                                     const Gradients& gradients, Workspace memory, cudaStream_t stream) const {
  if (all_keys) return dense_backward(plan, inputs(), results, dout.tensor(), gradients, memory, {stream});
  backward(plan, inputs(), kept, results, dout.tensor(), gradients, memory, {stream});
}

void ResidentTraining::run(bool all_keys, cudaStream_t stream) const {
  forward_pass(all_keys, selection(), {out.tensor(), lse.tensor()}, workspace.bytes(), stream);
  backward_pass(all_keys, selection(), {out.tensor(), lse.tensor()}, {dq.tensor(), dk.tensor(), dv.tensor()},
                workspace.bytes(), stream);
}

std::vector<Bytes> ResidentTraining::results(cudaStream_t stream) const {
  std::vector<Bytes> all;
  for (const Written* written : {&out, &lse, &dq, &dk, &dv}) all.push_back(written->bytes(stream));
  if (!gated) return all;  // the ids are the caller's
  for (const Written* written : {&ids, &counts, &offsets, &rows}) all.push_back(written->bytes(stream));
  return all;
}

}  // namespace moba::test
