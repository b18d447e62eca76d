// The contract between the public face and the backends: one checked call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "moba/attention.h"
#include "moba/plan.h"

namespace moba {

// One sequence of the packed batch. Query i of it sits at position k_len - q_len + i.
struct Sequence {
  std::int64_t q_begin = 0, q_len = 0;       // tokens of q
  std::int64_t k_begin = 0, k_len = 0;       // tokens of k and v
  std::int64_t block_begin = 0, blocks = 0;  // blocks, numbered through the batch; blocks = ceil(k_len / B)

  std::int64_t first_position() const { return k_len - q_len; }
};

// Where the keys of one cached sequence lie: key i is row i % size of page ids[i / size], and pages are `stride`
// elements apart. No ids: key i is row i.
struct KeyPages {
  const std::int32_t* ids = nullptr;
  std::int64_t size = 0, stride = 0;
};

// What every step of a backend takes first. Everything in it has been checked, but for what lies on a device.
struct Call {
  const Plan::Impl& plan;
  ConstTensor q, k, v;              // [Tq, Hq, d], [Tk, Hk, d], [Tk, Hk, d]
  std::vector<Sequence> sequences;  // empty for device calls, whose tables only the device can read:
  ConstTensor cu_seqlens_q, cu_seqlens_k;
  Workspace scratch;  // plan.scratch_bytes (backward: plan.backward_scratch_bytes), begins at a multiple of kAlignment
  Stream stream;
  KeyPages k_pages = {}, v_pages = {};  // of the one sequence of a call over a cache, which only attend of the cpu sees
};

// On the host: the transpose is not that of the ids, or not yet. attend refuses it until index has written it.
inline void mark_stale(const Selection& selection) { *static_cast<std::int64_t*>(selection.offsets.data) = -1; }
inline bool is_stale(const Selection& selection) {
  return *static_cast<const std::int64_t*>(selection.offsets.data) == -1;
}

// What forward keeps in the workspace between its steps.
struct Intermediates {
  Tensor q_rotated, k_rotated;  // as q and k; only with a rope
  Tensor centroids;             // [max_blocks, Hk, d]
  Selection selection;          // on a device only one to keep: it chooses and attends slab by slab
};

// What a backward step reads of the forward one and of what follows it.
struct Cotangents {
  ConstTensor out, lse;  // [Tq, Hq, d], f32 [Hq, Tq]
  ConstTensor dout;      // [Tq, Hq, d]
};

// n / by rounded up, for n >= 0 and any by > 0, however large.
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return n / by + (n % by != 0); }

// Where a piece of the workspace may begin: at a cache line, and at a row of partial results on a GPU, which costs a
// tenth more to read across an additional line.
inline constexpr std::size_t kAlignment = 256;
constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
// A workspace without its first bytes, up to where a piece may begin. Its size counts kAlignment for that.
inline Workspace from_aligned(Workspace workspace) {
  const auto address = reinterpret_cast<std::uintptr_t>(workspace.data());
  return workspace.subspan(aligned(address) - address);
}

// How far a causal row at `position` sees into the block that starts at key `start` and has `length` keys.
inline std::int64_t visible_keys(std::int64_t position, std::int64_t start, std::int64_t length, bool causal) {
  if (!causal) return length;
  const std::int64_t seen = position + 1 - start;
  return seen < 0 ? 0 : (seen < length ? seen : length);
}

// The steps; every backend has the same ones with the same names, in a namespace of its own. Stage by stage they are
// what moba/attention.h says of the functions of the same name; forward is all of them, after the choice of full
// attention (Plan::Impl::forward_is_dense). choose_all is what a selection keeps of a forward that was dense: on a
// device every block that a row sees, on the host that it is not written. backward and dense_backward take the q and k
// that were attended to, so rotated ones where the plan has a rope, and there they turn dq and dk back: those are the
// gradients of the unrotated q and k.
struct Steps {
  void (*rope)(const Call& call, const Tensor& q_rotated, const Tensor& k_rotated);
  void (*pool)(const Call& call, const Tensor& centroids);
  void (*gate)(const Call& call, const ConstTensor& centroids, const Selection& selection);
  void (*index)(const Call& call, const Selection& selection);
  void (*attend)(const Call& call, const Selection& selection, const Outputs& outputs);
  void (*dense)(const Call& call, const Outputs& outputs);
  void (*merge)(const Call& call, std::span<const Outputs> partials, const Outputs& outputs);
  void (*forward)(const Call& call, const Intermediates& memory, const Outputs& outputs);
  void (*choose_all)(const Call& call, const Selection& selection);
  void (*backward)(const Call& call, const Selection& selection, const Cotangents& given, const Gradients& gradients);
  void (*dense_backward)(const Call& call, const Cotangents& given, const Gradients& gradients);
};

// The call with q and k rotated into the memory for them, if the plan has a rope.
Call rotated(const Call& given, const Intermediates& memory);

#define MOBA_DECLARE_STEPS                                                                                          \
  void rope(const Call& call, const Tensor& q_rotated, const Tensor& k_rotated);                                    \
  void pool(const Call& call, const Tensor& centroids);                                                             \
  void gate(const Call& call, const ConstTensor& centroids, const Selection& selection);                            \
  void index(const Call& call, const Selection& selection);                                                         \
  void attend(const Call& call, const Selection& selection, const Outputs& outputs);                                \
  void dense(const Call& call, const Outputs& outputs);                                                             \
  void merge(const Call& call, std::span<const Outputs> partials, const Outputs& outputs);                          \
  void backward(const Call& call, const Selection& selection, const Cotangents& given, const Gradients& gradients); \
  void dense_backward(const Call& call, const Cotangents& given, const Gradients& gradients);

namespace reference {
MOBA_DECLARE_STEPS
extern const Steps kSteps;
}  // namespace reference
namespace cpu {
MOBA_DECLARE_STEPS
extern const Steps kSteps;
}  // namespace cpu

#undef MOBA_DECLARE_STEPS

}  // namespace moba
