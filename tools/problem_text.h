// A problem as text, e.g. "tokens=32768 q_heads=32 kv_heads=8 d=128 block=128 topk=8 dtype=bf16".
#pragma once

#include <string>
#include <string_view>

#include "moba/plan.h"

namespace moba::cli {

struct TextProblem {
  Problem problem;
  Options options;
  std::int64_t seqlen_q = 0, seqlen_k = 0;  // of every sequence of the batch
};

// key=value pairs separated by spaces or commas. Unknown and repeated keys and bad values are refused (moba::Error) by
// name; keys left out have the defaults that problem_text_help() states, or for how to compute what `options` say.
TextProblem parse_problem(std::string_view text, const Options& options = {});

// Every key, its default and what it means: lines for --help.
std::string problem_text_help();

// One line that says the problem again, with all defaults filled in.
std::string describe(const TextProblem& problem);

// The start offsets of the sequences of the batch: 0, length, 2 length, ...
std::vector<std::int64_t> start_offsets(std::int64_t batch, std::int64_t length);

}  // namespace moba::cli
