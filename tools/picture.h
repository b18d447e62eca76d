// Selection, kept mass and layout put together: the SVG file of moba map and moba compare.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention_file.h"
#include "kept_mass.h"
#include "moba/attention.h"
#include "moba/plan.h"

namespace moba::cli {

// Writes the picture of one sequence, from the ids of a selection per query head. `mass` is that sequence's.
void write_picture(const std::string& path, const std::string& input, const Plan& plan, const AttentionFile& file,
                   const ConstTensor& ids, const std::vector<KeptMass>& mass, std::int64_t sequence);

}  // namespace moba::cli
