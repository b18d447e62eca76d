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
  // Refuses (moba::Error) the number of a sequence that the file does not hold.
  void check_sequence(std::int64_t sequence) const;
  // Views of the tokens of one sequence, for offsets that the library has checked.
  Inputs sequence(std::int64_t sequence) const;
};

// Reads and checks names, dtypes and ranks; how the shapes fit together is the library's to check.
AttentionFile read_attention_file(const std::string& path);

// The tensor dout of the file, of q's dtype and shape; not given() where the file has none.
ConstTensor read_dout(const std::string& path, Buffer& memory);

}  // namespace moba::cli
