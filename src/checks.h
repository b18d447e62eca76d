// Every refusal of the library, apart from the code that computes. Each function throws moba::Error with one line that
// names the argument, what it was and what is allowed.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

#include "call.h"

namespace moba {

// Fills the defaults of the problem in and checks it and the options.
Problem checked(Problem problem, const Options& options);

// cu_seqlens of one side of the batch, as numbers.
std::vector<std::int64_t> checked_cu_seqlens(std::string_view argument, const ConstTensor& cu_seqlens,
                                             const Plan::Impl& plan, std::int64_t total, std::int64_t longest);

// The same of the caller's numbers.
void check_cu_seqlens(std::string_view argument, std::span<const std::int64_t> cu_seqlens, std::int64_t batch,
                      std::int64_t total, std::int64_t longest);

// What a tensor argument must be. Dimensions that may be anything are -1.
struct Expected {
  std::string_view argument;
  DType dtype;
  std::initializer_list<std::int64_t> shape;
  bool output = false;  // strides must not map two elements to one place
  bool last_stride_1 = true;
};
// A tensor in the memory that the plan's backend works on. Device kernels read and write the tensors of a 16-bit type
// in pieces of 16 bytes, and must be able to.
void check_tensor(const Plan::Impl& plan, const ConstTensor& tensor, const Expected& expected);
// The same of a problem's own tensors, while it is planned for `device`.
void check_tensor(Device device, int device_index, const ConstTensor& tensor, const Expected& expected);

// The tensor with strides that are safe to multiply: those of dimensions that are never stepped over may be anything.
// So may all of a tensor that a function does not read, and has not checked.
template <class AnyTensor>
AnyTensor tidy(AnyTensor tensor) {
  for (int i = 0; i < std::min(tensor.rank, kMaxRank); ++i) {
    if (tensor.shape[i] <= 1) tensor.stride[i] = i == tensor.rank - 1 ? 1 : 0;
  }
  return tensor;
}

// A RoPE table of the caller's has a row for every position of the batch.
void check_positions(const Call& call);

// Memory that a call writes and reads, by name, for check_no_overlap.
struct Region {
  std::string_view argument;
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
  ConstTensor view;  // a workspace has none

  Region(std::string_view name, const ConstTensor& tensor);
  Region(std::string_view name, Workspace workspace);
};
// No output may touch an input or another output. One that lies between the rows of the other, as dq, dk and dv of one
// buffer [tokens, heads, d] do, does not touch it.
void check_no_overlap(std::span<const Region> outputs, std::span<const Region> inputs);

// `what` names the function of Plan that says what is needed.
void check_workspace(const Plan::Impl& plan, Workspace workspace, std::size_t needed, std::string_view what);

// index() and select() on cuda, whose memory grows with tokens * blocks: only where the plan's limit has room for it.
void check_index_fits(const Plan::Impl& plan);
void check_backward_fits(const Plan::Impl& plan);

// Results against the shapes of the plan: written, or read again by backward; and what else it reads and writes.
void check_outputs(const Plan::Impl& plan, const Outputs& outputs);
void check_results(const Plan::Impl& plan, const ConstOutputs& results, const ConstTensor& dout);
void check_gradients(const Plan::Impl& plan, const Gradients& gradients);
void check_centroids(const Plan::Impl& plan, const ConstTensor& centroids, bool output);

// A selection against the shapes of the plan: ids (returns their heads), ids and counts, offsets, the transpose; what
// forward is to keep: everything on the cpu, ids and what else is given on cuda; what backward is given: the transpose
// on the cpu, ids on cuda, and what else there is, since gradients may not overlap it.
std::int64_t check_selection_ids(const Plan::Impl& plan, const Selection& selection, bool per_query_head);
void check_selection_rows(const Plan::Impl& plan, const Selection& selection, bool per_query_head);
void check_selection_offsets(const Plan::Impl& plan, const Selection& selection);
void check_kept_selection(const Plan::Impl& plan, const Selection& selection);
void check_backward_selection(const Plan::Impl& plan, const Selection& selection);
void check_selection_transpose(const Plan::Impl& plan, const Selection& selection);
// The content of ids, given by the caller: ascending block ids of the row's sequence, then -1.
void check_ids(const Call& call, const Selection& selection);
// The content of offsets and rows, given by the caller.
void check_transpose(const Call& call, const Selection& selection);

}  // namespace moba
