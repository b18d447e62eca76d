#include "selection_svg.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "text.h"

namespace moba::cli {
namespace {

constexpr int kLevels = 10;       // of darkness
constexpr int kMargin = 24;       // around everything
constexpr int kTitleLine = 18;    // down to the foot of the title
constexpr int kLine = 20;         // from one line below it to the next
constexpr int kLegend = 44;       // the legend, and the space below it
constexpr int kAxis = 44;         // left of the panels, for numbers and their name
constexpr int kFooter = 40;       // below the panels, for the same
constexpr int kTitle = 24;        // above each panel
constexpr int kGap = 22;          // between panels
constexpr int kLeastWidth = 640;  // the texts need it

const char* const kStyle = R"(<style>
text{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:13px;fill:#1f2328}
.title{font-size:19px;font-weight:600}.head{font-weight:600}.soft{fill:#59636e}.tick{font-size:11px;fill:#59636e}
.page{fill:#fff}.panel{fill:#fff;stroke:#c3cad2}.reach{fill:#eef1f4}.cells{stroke:#08519c;fill:none}.swatch{fill:#08519c}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.soft,.tick{fill:#9aa4af}.page{fill:#0d1117}
.panel{fill:#0d1117;stroke:#3d444d}.reach{fill:#1a2029}.cells{stroke:#8cc8ff}.swatch{fill:#8cc8ff}}
</style>
)";

// Text fit for XML: markup escaped, and what might not be valid there replaced.
std::string xml(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '&' || c == '<' || c == '>' || c == '"') {
      result += "&#" + std::to_string(int{c}) + ";";
    } else {
      result += c >= 0x20 && c < 0x7f ? c : '?';
    }
  }
  return result;
}

enum class Anchor { start, middle, end };

// A line of text; `kind` is one of the classes of the style.
std::string label(const char* kind, int x, int y, const std::string& text, Anchor anchor = Anchor::start) {
  static constexpr std::array kAnchors{"", " text-anchor=\"middle\"", " text-anchor=\"end\""};
  return format("<text class=\"%s\" x=\"%d\" y=\"%d\"%s>", kind, x, y, kAnchors[static_cast<std::size_t>(anchor)]) +
         xml(text) + "</text>\n";
}

std::string percent(double share) { return format("%.1f %%", 100.0 * share); }

double opacity(int level) { return 0.1 + 0.9 * (level - 1) / (kLevels - 1); }

// Sizes in pixels. Cells are whole pixels, so that their edges are sharp.
struct Layout {
  Layout(const SelectionMap& map, std::size_t lines_below_title)
      : header(kTitleLine + kLine * static_cast<int>(lines_below_title + 1) + kLegend) {
    const auto heads = static_cast<int>(map.shares.size());
    across = std::max(1, std::min(heads, static_cast<int>(std::ceil(std::sqrt(heads)))));
    down = std::max(1, (heads + across - 1) / across);
    const int wanted = across <= 4 ? 256 : (across <= 8 ? 160 : 128);
    const auto columns = static_cast<int>(std::max<std::int64_t>(1, map.columns));
    const auto rows = static_cast<int>(std::max<std::int64_t>(1, map.rows));
    cell_width = std::max(1, wanted / columns);
    cell_height = std::max(cell_width, (24 + rows - 1) / rows);  // a lone row of decoding queries is to be seen
    panel_width = cell_width * columns;
    panel_height = cell_height * rows;
    width = std::max(kLeastWidth, 2 * kMargin + kAxis + across * panel_width + (across - 1) * kGap);
    height = 2 * kMargin + header + down * (kTitle + panel_height) + (down - 1) * kGap + kFooter;
  }
  int left(int head) const { return kMargin + kAxis + head % across * (panel_width + kGap); }
  int top(int head) const { return kMargin + header + kTitle + head / across * (kTitle + panel_height + kGap); }

  int header;  // title, lines, legend
  int across, down, cell_width, cell_height, panel_width, panel_height, width, height;
};

// The darkness of a share. Cells of several blocks are mostly pale, so that there darkness grows with the square root.
int level_of(double share, std::int64_t blocks_per_cell) {
  const double amount = blocks_per_cell == 1 ? share : std::sqrt(share);
  return std::clamp(static_cast<int>(std::ceil(amount * kLevels)), 0, kLevels);
}

// The largest share of a level, in percent.
int percent_of(int level, std::int64_t blocks_per_cell) {
  return blocks_per_cell == 1 ? 100 * level / kLevels : 100 * level * level / (kLevels * kLevels);
}

std::string legend(int x, int y, std::int64_t blocks_per_cell) {
  constexpr int kSwatch = 24;
  std::string svg;
  for (int level = 1; level <= kLevels; ++level) {
    const int left = x + (level - 1) * kSwatch;
    svg += format("<rect class=\"swatch\" fill-opacity=\"%.2f\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"14\"/>\n",
                  opacity(level), left, y, kSwatch);
    if (level == 1 || level == kLevels / 2 || level == kLevels) {
      const std::string most = std::to_string(percent_of(level, blocks_per_cell)) + " %";
      svg += label("tick", left + kSwatch / 2, y + 28, most, Anchor::middle);
    }
  }
  std::string meaning = "of the queries of a block chose the key block";
  if (blocks_per_cell > 1) {
    const std::string side = std::to_string(blocks_per_cell);
    meaning = "of the (query, key block) pairs of a cell, " + side + " x " + side + " blocks, were chosen";
  }
  return svg + label("soft", x + 12 + kLevels * kSwatch, y + 12, meaning);
}

// The cells that causality leaves, shared by all panels.
std::string reach_path(const SelectionMap& map, bool causal) {
  std::string path = "M0 0";
  for (std::int64_t row = 0; row < map.rows; ++row) {
    const std::int64_t end = causal ? std::min(map.columns, map.first_row + row + 1) : map.columns;
    path.append("H").append(std::to_string(end)).append("V").append(std::to_string(row + 1));
  }
  return path + "H0Z";
}

// The cells of one head: a path per level, a stroke per run of cells of the same level.
std::string cell_paths(const SelectionMap& map, std::size_t head) {
  std::vector<std::string> paths(kLevels + 1);
  const auto level_at = [&](std::int64_t row, std::int64_t column) {
    return level_of(map.share(head, row, column), map.blocks_per_cell);
  };
  for (std::int64_t row = 0; row < map.rows; ++row) {
    for (std::int64_t column = 0, end = 0; column < map.columns; column = end) {
      const int level = level_at(row, column);
      for (end = column + 1; end < map.columns && level_at(row, end) == level;) ++end;
      if (level == 0) continue;
      std::string& path = paths[static_cast<std::size_t>(level)];
      path.append("M").append(std::to_string(column)).append(" ").append(std::to_string(row));
      path.append("h").append(std::to_string(end - column));
    }
  }
  std::string svg;
  for (int level = 1; level <= kLevels; ++level) {
    const std::string& path = paths[static_cast<std::size_t>(level)];
    if (!path.empty()) svg += format("<path stroke-opacity=\"%.2f\" d=\"", opacity(level)) + path + "\"/>\n";
  }
  return svg;
}

std::string panel(const SelectionMap& map, const Layout& layout, std::size_t head, const KeptMass& mass) {
  const auto number = static_cast<int>(head);
  std::string svg = format("<g transform=\"translate(%d %d)\">\n", layout.left(number), layout.top(number));
  svg += format("<title>head %d: %s of the dense attention mass kept, at the least %s in a row</title>\n", number,
                percent(mass.mean).c_str(), percent(mass.min).c_str());
  svg += label("head", 0, -8, "head " + std::to_string(number));
  const char* const kept = layout.panel_width >= 150 ? " kept" : "";  // where there is room
  svg += label("soft", layout.panel_width, -8, percent(mass.mean) + kept, Anchor::end);
  svg += format("<rect class=\"panel\" x=\"-.5\" y=\"-.5\" width=\"%d\" height=\"%d\"/>\n", layout.panel_width + 1,
                layout.panel_height + 1);
  svg += format("<g transform=\"scale(%d %d)\" shape-rendering=\"crispEdges\"><use href=\"#reach\"/>\n",
                layout.cell_width, layout.cell_height);
  svg += "<g class=\"cells\" transform=\"translate(0 .5)\">\n" + cell_paths(map, head) + "</g></g></g>\n";
  return svg;
}

// Left of the first panel of each row: numbers and name of the query blocks.
std::string query_axis(const SelectionMap& map, const Layout& layout, int head) {
  const int left = layout.left(head), top = layout.top(head), bottom = top + layout.panel_height;
  const std::int64_t first = map.first_row * map.blocks_per_cell, last = map.blocks - 1;
  std::string svg = label("tick", left - 6, bottom - 1, std::to_string(last), Anchor::end);
  if (map.rows > 1) svg += label("tick", left - 6, top + 10, std::to_string(first), Anchor::end);
  if (layout.panel_height < 90) return svg;  // no room for the name
  return svg + format("<g transform=\"translate(%d %d) rotate(-90)\">", left - 26, (top + bottom) / 2) +
         label("soft", 0, 0, "query block", Anchor::middle) + "</g>\n";
}

// Below the last panel of each column: numbers and name of the key blocks.
std::string key_axis(const SelectionMap& map, const Layout& layout, int head) {
  const int left = layout.left(head), right = left + layout.panel_width;
  const int y = layout.top(head) + layout.panel_height + 16;
  std::string svg = label("tick", left, y, "0") + label("soft", (left + right) / 2, y, "key block", Anchor::middle);
  if (map.columns > 1) svg += label("tick", right, y, std::to_string(map.blocks - 1), Anchor::end);
  return svg;
}

std::string axes(const SelectionMap& map, const Layout& layout) {
  const auto heads = static_cast<int>(map.shares.size());
  std::string svg;
  for (int head = 0; head < heads; ++head) {
    if (head % layout.across == 0) svg += query_axis(map, layout, head);
    if (head + layout.across >= heads) svg += key_axis(map, layout, head);
  }
  return svg;
}

}  // namespace

std::int64_t most_cells_for(std::int64_t heads) {
  // Half of a causal panel's cells can be marked, at about 10 bytes each when no two neighbours are alike.
  constexpr double kMarkedCells = 80'000;
  const double side = std::sqrt(2.0 * kMarkedCells / static_cast<double>(std::max<std::int64_t>(1, heads)));
  return std::clamp(static_cast<std::int64_t>(side), std::int64_t{8}, std::int64_t{128});
}

std::string draw_selection(const SelectionMap& map, const std::vector<KeptMass>& mass, const SvgText& text) {
  const Layout layout(map, text.lines.size());
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" role=\"img\" "
      "aria-label=\"%s\">\n",
      layout.width, layout.height, layout.width, layout.height, xml(text.title).c_str());
  svg += kStyle;
  svg += "<defs><path id=\"reach\" class=\"reach\" d=\"" + reach_path(map, text.causal) + "\"/></defs>\n";
  svg += "<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n";
  svg += label("title", kMargin, kMargin + kTitleLine, text.title);
  int y = kMargin + kTitleLine + 4;
  for (const std::string& line : text.lines) svg += label("soft", kMargin, y += kLine, line);
  svg += legend(kMargin, y + kLine / 2, map.blocks_per_cell);
  svg += axes(map, layout);
  if (map.shares.empty()) svg += label("soft", kMargin, layout.top(0), "No query of this sequence has a key.");
  for (std::size_t head = 0; head < map.shares.size(); ++head) svg += panel(map, layout, head, mass[head]);
  return svg + "</svg>\n";
}

}  // namespace moba::cli
