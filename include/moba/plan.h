// Plan: made once from shapes alone, used for any number of calls; says what memory a call needs before it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moba/config.h"
#include "moba/export.h"
#include "moba/tensor.h"

namespace moba {

enum class Backend : std::uint8_t {
  cpu,        // vectorised and threaded
  reference,  // float64, plain loops: the ground truth, slow on purpose
  cuda,       // an NVIDIA GPU of compute capability 8.0 or later, if the build has CUDA (cuda_support(), moba/info.h)
};

MOBA_EXPORT const char* name(Backend backend);

// How the cpu backend multiplies bfloat16 inputs.
enum class Bf16Products : std::uint8_t {
  automatic,  // dot where the processor has it and it is the faster of the two
  widen,      // widen to float32, float32 FMA; the probabilities stay float32
  dot,        // AVX512_BF16 pair products, float32 accumulation; the probabilities are rounded to bfloat16
};

// The shapes of a call. Tensors of a call must match them exactly.
struct Problem {
  DType dtype = DType::f32;       // of q, k, v, out: f32, f16 or bf16
  std::int64_t q_heads = 1;       // Hq, a multiple of kv_heads
  std::int64_t kv_heads = 1;      // Hk >= 1
  std::int64_t head_dim = 128;    // d, 8 to 256
  std::int64_t batch = 1;         // sequences packed into one call, >= 0
  std::int64_t total_q = 0;       // Tq, query tokens of the batch
  std::int64_t total_k = 0;       // Tk, key tokens of the batch
  std::int64_t max_seqlen_q = 0;  // longest sequence allowed; 0 means the total, which costs packed batches
  std::int64_t max_seqlen_k = 0;  // memory and time: workspaces and dense_backward's passes are for such lengths
  Config config;
  std::optional<Rope> rope;  // not given: q and k are taken as they are
};

// How to compute it. The results do not depend on `threads`.
struct Options {
  Backend backend = Backend::cpu;
  int threads = 0;         // at most this many threads work on a call; 0 means one per core. The reference has one
  std::string cpu_target;  // one of cpu_targets() (moba/info.h); empty means the best one
  Bf16Products bf16_products = Bf16Products::automatic;

  // cuda: the device, as cudaSetDevice counts; the kernel family, "sm90" (Hopper) or "portable" (compute capability 8.0
  // and later), empty for the best that the device has; a step that sm90 has no kernel for (gate, from top_k 18 on)
  // takes the portable one. And how many bytes workspace_bytes() and backward_workspace_bytes() may come to at most; 0
  // for 2 GiB, and for backward for as much as q, k, v and out take, 1.375 to 2 GiB, beyond what rope and centroids
  // take; more only where a plan cannot do with less (many short sequences) or backward needs sums of dk and dv over
  // slabs of tokens (very long sequences): 8 bytes for each element of k of one key head, and 1 to 2 GiB beside them.
  // Less memory means more and shorter passes over heads, queries and keys; out and lse are the same bits, where v is
  // finite, gradients may differ in the last. Backward is refused where it cannot do with so little;
  // backward_workspace_bytes() then is what it needs. dense_backward makes do with what backward takes of the limit, or
  // with 256 MiB of it if that is more.
  int cuda_device = 0;
  std::string cuda_kernels;
  std::size_t workspace_limit = 0;
};

// Floating point operations (a multiply-add counts two) of one call, from the given sequence lengths.
struct Arithmetic {
  double pool = 0;
  double gate = 0;            // scores of the candidate blocks
  double attend = 0;          // both products over the (query, key) pairs that MoBA keeps, when every row fills its k
  double dense = 0;           // both products of full attention
  double pairs = 0;           // (query, key) pairs that MoBA keeps, summed over the query heads
  double backward = 0;        // five products over the pairs of attend
  double dense_backward = 0;  // and over those of dense
};

class MOBA_EXPORT Plan {
 public:
  // Throws moba::Error for a problem or an option that is not served. Touches no tensor; for the cuda backend it asks
  // the driver what the device is.
  explicit Plan(const Problem& problem, const Options& options = {});
  ~Plan();
  // Cheap, and there is no move: no plan is ever left empty.
  Plan(const Plan&);
  Plan& operator=(const Plan&);

  const Problem& problem() const;
  const Options& options() const;

  // Bytes of scratch that any function taking this plan may use, but for the backward ones: all the memory a call takes
  // beyond its tensors, but on the cpu for about 100 bytes a sequence of the batch. (The reference backend allocates
  // some more inside its loops.)
  std::size_t workspace_bytes() const;
  // The same of backward and dense_backward, which need more: sums of dk and dv in float32; on cuda also partial
  // results of dq.
  std::size_t backward_workspace_bytes() const;
  // Whether forward is dense(): the longest sequence allowed has at most top_k blocks, so every row chooses all of
  // them.
  bool forward_is_dense() const;
  // Bytes of a Selection (moba/attention.h), shared by the heads of a key head or not.
  std::size_t selection_bytes(bool shared = false) const;
  // Of those, the bytes of its ids: all that backward needs on cuda.
  std::size_t ids_bytes(bool shared = false) const;
  // Ids per row of a Selection: min(top_k, blocks of the longest sequence allowed).
  std::int64_t slots() const;
  // Upper bound on the blocks of a batch: rows of the centroids tensor.
  std::int64_t max_blocks() const;
  // Threads that a call uses at most.
  int threads() const;
  // The kernels chosen, for people: "cpu AVX3, float32 products, 2 threads".
  std::string kernels() const;
  // The arithmetic of a call. cu_seqlens hold batch + 1 ascending entries from 0 to the total.
  Arithmetic arithmetic(const std::vector<std::int64_t>& cu_seqlens_q,
                        const std::vector<std::int64_t>& cu_seqlens_k) const;
  // The same for a batch of one sequence.
  Arithmetic arithmetic() const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;  // never changes, so copies share it; never null
};

}  // namespace moba
