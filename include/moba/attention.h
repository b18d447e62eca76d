// The operator and its stages. Every function takes a Plan (shapes, memory, kernels) and views of the caller's memory;
// none keeps a pointer after it returns. All throw moba::Error before anything is written when an argument is refused,
// and std::bad_alloc if there is no memory for the few small things they allocate (a list of the sequences, threads'
// tasks).
//
// With a plan of the cuda backend all tensors and the workspace lie on its device; q, k, v, out, dout, gradients,
// centroids and rotated copies at multiples of 16 bytes, with strides that are multiples of 8 above 0. A function puts
// its work on the stream, whatever device is current, and returns: it allocates nothing, waits for nothing and can be
// captured in a CUDA graph (CUDA itself loads a kernel at its first launch in a process, unless CUDA_MODULE_LOADING is
// EAGER; on Hopper and later a graph of any function but merge may have programmatic edges, which CUDA knows from 12.3
// on). So what only the device can see is not refused: with cu_seqlens that are not as they must be, every row of out
// and lse, and of the gradients, is NaN; a row whose ids are not as they must be is chosen by no block, and its out,
// lse and dq are NaN. No memory is touched that was not given.
//
// Shapes: Tq, Tk tokens of the packed batch, Hq query heads, Hk key heads, g = Hq / Hk, d head dim. docs/spec.md
// defines the computation; arXiv 2502.13189 is where it comes from.
#pragma once

#include <cstddef>
#include <span>

#include "moba/export.h"
#include "moba/plan.h"
#include "moba/tensor.h"

namespace moba {

// q [Tq, Hq, d], k and v [Tk, Hk, d], all of the plan's dtype; any strides >= 0 but the last, which is 1.
// cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], ascending from 0 to Tq and Tk; both may be left out when batch is 1.
struct Inputs {
  ConstTensor q, k, v;
  ConstTensor cu_seqlens_q, cu_seqlens_k;
};

// out [Tq, Hq, d] of the plan's dtype, last stride 1. lse f32 [Hq, Tq], any strides, natural logarithm of the sum of
// exp(scale * q . k); may be left out. A row with no key: out = 0, lse = -inf.
struct Outputs {
  Tensor out;
  Tensor lse;
};

// Which blocks each row attends to, and the transpose of that. Blocks are numbered from 0 in each sequence; in the
// transpose they are numbered through the batch, sequence after sequence. The last stride of ids is 1, counts may have
// any, offsets and rows are contiguous.
struct Selection {
  Tensor ids;      // i32 [Tq, Hs, slots], ascending, then -1; Hs = Hq, or Hk: shared by the g heads of a key head
  Tensor counts;   // i32 [Tq, Hs], ids that are not -1
  Tensor offsets;  // i64 [Hk * max_blocks + 1]; rows of (key head h, block b) stand at offsets[h * max_blocks + b] ...
  Tensor rows;     // i32 [Tq * Hq * slots], token * g + head within the group, ascending for each (key head, block)
};

// What a forward computation wrote, as backward reads it: shapes and strides of Outputs, lse included.
struct ConstOutputs {
  ConstTensor out, lse;
};

// Gradients of q [Tq, Hq, d], k and v [Tk, Hk, d], of the plan's dtype; last stride 1.
struct Gradients {
  Tensor dq, dk, dv;
};

// Scratch memory of at least plan.workspace_bytes() (backward_workspace_bytes() for the backward functions), any
// alignment; no content is expected or kept.
using Workspace = std::span<std::byte>;

// The queue that device work goes to (a cudaStream_t; null is the default stream); the cpu takes none.
struct Stream {
  void* handle = nullptr;
};

// The whole operator: rope (if the plan has one), pool, gate, index, attend. Where ceil(max_seqlen_k / block_size) <=
// top_k every row would choose every block it sees: then it is dense(), to the bit, and kernels() says so.
MOBA_EXPORT void forward(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Workspace workspace,
                         Stream stream = {});

// The same, and keeps the selection it made for backward: all four tensors are written, ids with Hq heads. Where
// plan.forward_is_dense() there is nothing to choose: the selection may be left empty, or is marked as not written. On
// cuda ids are written, and counts if given; offsets, if given, are marked as out of date (see gate), and where
// plan.forward_is_dense() the ids are all that a row sees.
MOBA_EXPORT void forward(const Plan& plan, const Inputs& inputs, const Selection& selection, const Outputs& outputs,
                         Workspace workspace, Stream stream = {});

// Full attention over the same inputs, with the same rope, mask and scale: what MoBA is compared with, and what it
// equals when top_k covers every block.
MOBA_EXPORT void dense(const Plan& plan, const Inputs& inputs, const Outputs& outputs, Workspace workspace,
                       Stream stream = {});

// dq, dk and dv of sum(dout * out), from dout [Tq, Hq, d] of the plan's dtype (last stride 1) and from what forward
// read, chose and wrote. Every element of the gradients is written. The selection is a constant: nothing flows through
// the gate. Inputs are those of forward: with a rope in the plan the unrotated q and k, which are rotated anew, and dq
// and dk are those of the unrotated ones. Reads offsets and rows of the selection; where plan.forward_is_dense() and
// the selection is empty or not written since, it is dense_backward(). On a plan without rope it also serves a
// selection of the caller's own and what attend wrote with it. A row with no key gets and gives zeros (on cuda, if its
// dout is finite: docs/spec.md section 11); a key that no row attends to gets zeros. The workspace is one of
// plan.backward_workspace_bytes(). No element of a gradient may be one of another tensor; gradients may lie between one
// another's rows, as parts of one buffer [tokens, heads, d], if one stride of theirs shows that they never meet.
//
// On cuda it reads ids instead, [Tq, Hq, slots] or [Tq, Hk, slots], and is dense_backward() only where they are left
// out; ids that nobody wrote are read as they stand. With the same plan, on the same kind of device, the same call
// gives the same bits in every run: nothing is added up atomically.
MOBA_EXPORT void backward(const Plan& plan, const Inputs& inputs, const Selection& selection,
                          const ConstOutputs& results, const ConstTensor& dout, const Gradients& gradients,
                          Workspace workspace, Stream stream = {});

// The same of dense.
MOBA_EXPORT void dense_backward(const Plan& plan, const Inputs& inputs, const ConstOutputs& results,
                                const ConstTensor& dout, const Gradients& gradients, Workspace workspace,
                                Stream stream = {});

// Views into `memory` (at least plan.selection_bytes(shared) bytes, 8-byte aligned, on the plan's device) with the
// shapes that the plan wants.
MOBA_EXPORT Selection make_selection(const Plan& plan, std::span<std::byte> memory, bool shared = false);

// ---- The stages. They take q and k as they are, whether or not the plan has a rope: call rope first where positions
// are to be rotated in, and give its results to the others. ----

// rope: rotated copies q_rotated [Tq, Hq, d] and k_rotated [Tk, Hk, d]. The plan must have a rope.
MOBA_EXPORT void rope(const Plan& plan, const Inputs& inputs, const Tensor& q_rotated, const Tensor& k_rotated,
                      Workspace workspace, Stream stream = {});

// pool: centroids [max_blocks, Hk, d] of the plan's dtype, the mean key of each block; rows past the last block are
// not written. Only k and cu_seqlens_k of the inputs are read.
MOBA_EXPORT void pool(const Plan& plan, const Inputs& inputs, const Tensor& centroids, Workspace workspace,
                      Stream stream = {});

// gate: the chosen ids of every row, from q and the centroids (or any block representatives of the caller's). Writes
// selection.ids, which must hold Hq heads, and counts. The transpose, if given, is marked as out of date (offsets[0] =
// -1): on the cpu attend refuses it until index has run.
MOBA_EXPORT void gate(const Plan& plan, const Inputs& inputs, const ConstTensor& centroids, const Selection& selection,
                      Workspace workspace, Stream stream = {});

// index: checks selection.ids (ascending, in range, then -1) and writes counts, offsets and rows. To attend to a
// selection of one's own, fill ids and call this. On cuda it takes workspace for 6 * blocks * (tokens * g / 1024) bytes
// a key head, of the longest such problems more than a plan has; they are refused here and in select, and nowhere else.
MOBA_EXPORT void index(const Plan& plan, const Inputs& inputs, const Selection& selection, Workspace workspace,
                       Stream stream = {});

// select: pool, gate and index in one call.
MOBA_EXPORT void select(const Plan& plan, const Inputs& inputs, const Selection& selection, Workspace workspace,
                        Stream stream = {});

// attend: attention of every row over the keys of its blocks, masked causally if the plan is causal. Reads offsets and
// rows of the selection; on cuda its ids instead, and transposes them slab by slab as memory allows.
MOBA_EXPORT void attend(const Plan& plan, const Inputs& inputs, const Selection& selection, const Outputs& outputs,
                        Workspace workspace, Stream stream = {});

// merge: attention over the union of disjoint key sets, from the results over each: out = sum of exp(lse_i - lse)
// out_i, added up in the order given. Each partial has the shapes of Outputs, lse included; on cuda there are at
// most 48. Partials may not overlap outputs.
MOBA_EXPORT void merge(const Plan& plan, std::span<const Outputs> partials, const Outputs& outputs, Stream stream = {});

}  // namespace moba
