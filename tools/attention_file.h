// Attention inputs in a safetensors file: q [Tq, Hq, d], k and v [Tk, Hk, d], and for a batch of sequences cu_seqlens,
// or cu_seqlens_q and cu_seqlens_k. Other tensors are passed over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "buffer.h"
#include "commands.h"
#include "moba/attention.h"
#include "moba/plan.h"

namespace moba::cli {

struct AttentionFile {
  Buffer q, k, v, cu_seqlens_q, cu_seqlens_k;
  Inputs inputs;                                 // views of the above
  std::vector<std::int64_t> starts_q, starts_k;  // the cu_seqlens; {0, total} where the file has none

  // The shapes of the file with what the user wants of them.
  Problem problem(const AttentionOptions& attention) const;
  // "q bf16 [4096, 9, 64], k and v bf16 [4096, 3, 64]"
  std::string describe() const;
};

// Reads and checks names, dtypes and ranks; how the shapes fit together is the library's to check.
AttentionFile read_attention_file(const std::string& path);

}  // namespace moba::cli
