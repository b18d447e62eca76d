// What is being computed, in one line for people.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "moba/plan.h"
#include "safetensors.h"

namespace moba::cli {

// "block size 128, top-k 8, causal, rope half-split base 100000"; without blocks: full attention.
std::string describe_attention(const Problem& problem, bool blocks);

// The same as keys and values, for the metadata of an output file.
std::map<std::string, std::string> describe_output(const Problem& problem, bool blocks);

// "out f32 [64, 4, 16], lse f32 [4, 64]"
std::string list(const std::vector<NamedTensor>& tensors);

}  // namespace moba::cli
