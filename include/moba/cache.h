// A cache of keys, values and centroids, and attention over it: what a server runs token by token.
//
// One CachePlan serves the whole life of a server: it holds bounds (sequences, new tokens of a call, length of a
// sequence), not lengths, so a cache that grows needs no new plan. The library owns no memory and keeps no state: k, v,
// centroids, lengths and page tables are the caller's, and a step of the model is, for each layer,
//
//   1. the caller adds the new tokens to the lengths (and pages to the tables where needed): once for all layers
//   2. append(plan, k, v, cu_seqlens, cache, workspace)        writes keys, values, and the centroids of closed blocks
//   3. decode(plan, q, cu_seqlens, cache, outputs, workspace)  the queries of the same tokens over all that is cached
//
// No function writes lengths or tables. cu_seqlens says how many tokens of each sequence are new; they are its last
// ones. A prompt fed whole, in chunks of any size or token by token gives the same selection and, but for rounding, the
// same out.
//
// The cpu and the reference backend serve a cache; a plan of the cuda backend is refused. docs/spec.md section 14.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "moba/attention.h"
#include "moba/config.h"
#include "moba/export.h"
#include "moba/plan.h"
#include "moba/tensor.h"

namespace moba {

// What a cache is for: bounds that hold for every call.
struct CacheProblem {
  DType dtype = DType::f32;         // of q, k, v, out and of the cache: f32, f16 or bf16
  std::int64_t q_heads = 1;         // Hq, a multiple of kv_heads
  std::int64_t kv_heads = 1;        // Hk >= 1
  std::int64_t head_dim = 128;      // d, 8 to 256
  std::int64_t max_batch = 1;       // sequences of one call at most, >= 1
  std::int64_t max_new_tokens = 1;  // new tokens of one call at most, all sequences together, >= 1
  std::int64_t max_length = 0;      // tokens of one sequence at most, >= 1
  Config config;                    // causal only: what comes later cannot be seen before
  // With a rope append writes k rotated by its position in the sequence, and decode rotates q: the cache holds rotated
  // keys. Without one both are taken as they are.
  std::optional<Rope> rope;
};

class MOBA_EXPORT CachePlan {
 public:
  // Throws moba::Error for a problem or an option that is not served.
  explicit CachePlan(const CacheProblem& problem, const Options& options = {});
  ~CachePlan();
  CachePlan(const CachePlan&);
  CachePlan& operator=(const CachePlan&);

  const CacheProblem& problem() const;
  const Options& options() const;

  // Bytes of scratch that append and decode may use. Beyond it they allocate about 100 bytes a sequence and key head,
  // 16 bytes a block that closes and a bit a page. (The reference backend allocates more: it gathers each sequence.)
  std::size_t workspace_bytes() const;
  // Closed blocks of the longest sequence: max_length / block_size. As many rows of centroids does a sequence need.
  std::int64_t max_blocks() const;
  // Ids per row of DecodeOutputs::ids: min(top_k, blocks of the longest sequence, the last and open one counted).
  std::int64_t slots() const;
  int threads() const;
  std::string kernels() const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;
};

// Views of the cache of one layer. batch is the number of sequences of the call, at most max_batch; sequence s has row
// s of everything, in every call, and length 0 where the row is free.
//
// Contiguous: neither a block table nor indptr is given. k and v are [batch, capacity, Hk, d].
// Paged: k and v are [pages, page_size, Hk, d], any page size; token t of a sequence is row t % page_size of its page
// t / page_size. Which page that is says either block_table together with lengths, or indptr, indices and
// last_page_len. Sequences may share pages (of a common prefix, whose centroids the caller then copies from row to
// row), but append refuses to write to a page that stands in the tables twice. A call reads the
// tables through, append the written part once more. Lengths may go down again: the tokens behind them are forgotten,
// and the next append writes their places and the centroids of the blocks that it fills.
//
// k, v and centroids are of the plan's dtype, with any strides but for the last, which is 1: heads may come before
// tokens, and k and v of a page may lie beside each other. Heads first reads fastest: then the keys of a head and a
// block are one piece of memory (decode of one token takes 0.85 of the time). Tables are i32, their last stride 1.
struct Cache {
  Tensor k, v;
  Tensor centroids;  // [batch, blocks, Hk, d], at least length / B blocks: the means of the blocks that are full

  ConstTensor lengths;  // i32 [batch], tokens of each sequence, those of this call included. Not with indptr

  ConstTensor block_table;  // i32 [batch, max_pages]; only the first ceil(length / page_size) of a row are read

  ConstTensor indptr;         // i32 [batch + 1], ascending from 0; the pages of sequence s are
  ConstTensor indices;        // i32 [any]: indices[indptr[s]] to indices[indptr[s + 1] - 1],
  ConstTensor last_page_len;  // i32 [batch], the last of which holds so many tokens, 1 to page_size; not read where
                              // there is no page. The length is (pages - 1) * page_size + last_page_len
};

// out [Tnew, Hq, d] of the plan's dtype, last stride 1; lse f32 [Hq, Tnew], any strides, may be left out; ids i32
// [Tnew, Hq, slots], last stride 1, may be left out: the blocks that each row attended to, ascending, then -1.
struct DecodeOutputs {
  Tensor out;
  Tensor lse;
  Tensor ids;
};

// Writes k and v [Tnew, Hk, d] (any strides but the last) into the last cu_seqlens[s + 1] - cu_seqlens[s] places of
// each sequence and, of the blocks that they fill, the centroids: with the sums of pool(), to the bit. cu_seqlens is
// i32 [batch + 1], ascending from 0 to Tnew; it may be left out when batch is 1. What was cached before is read only to
// complete a block.
MOBA_EXPORT void append(const CachePlan& plan, const ConstTensor& k, const ConstTensor& v,
                        const ConstTensor& cu_seqlens, const Cache& cache, Workspace workspace);

// Attention of q [Tnew, Hq, d] over the cache, for the last cu_seqlens[s + 1] - cu_seqlens[s] tokens of each sequence,
// whose keys have been appended. Each row scores the centroids of the blocks before its own, and attends to the best of
// them and to its own, in place: nothing of the cache is copied or written, and blocks that no row chose are not read.
MOBA_EXPORT void decode(const CachePlan& plan, const ConstTensor& q, const ConstTensor& cu_seqlens, const Cache& cache,
                        const DecodeOutputs& outputs, Workspace workspace);

}  // namespace moba
