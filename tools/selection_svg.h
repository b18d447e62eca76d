// A SelectionMap as a picture.
#pragma once

#include <string>
#include <vector>

#include "kept_mass.h"
#include "selection_map.h"

namespace moba::cli {

struct SvgText {
  std::string title;
  std::vector<std::string> lines;  // below the title
  bool causal = true;
};

// Cells along a side of a panel, at most: fewer for many heads, so that the file stays below a megabyte.
std::int64_t most_cells_for(std::int64_t heads);

// A self-contained SVG file: one panel per head, in a grid, with the share of dense attention mass that the head kept.
std::string draw_selection(const SelectionMap& map, const std::vector<KeptMass>& mass, const SvgText& text);

}  // namespace moba::cli
