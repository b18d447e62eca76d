#include "picture.h"

#include <filesystem>

#include "describe.h"
#include "output_file.h"
#include "selection_map.h"
#include "selection_svg.h"
#include "text.h"

namespace moba::cli {

void write_picture(const std::string& path, const std::string& input, const Plan& plan, const AttentionFile& file,
                   const ConstTensor& ids, const std::vector<KeptMass>& mass, std::int64_t sequence) {
  const auto s = static_cast<std::size_t>(sequence);
  const std::int64_t k_len = file.starts_k[s + 1] - file.starts_k[s];
  const SelectionMap map = make_selection_map(plan, ids, file.starts_q[s], file.starts_q[s + 1], k_len,
                                              most_cells_for(plan.problem().q_heads));
  SvgText text;
  text.causal = plan.problem().config.causal;
  text.title = "MoBA: which key blocks the queries chose";
  text.lines = {printable(std::filesystem::path(input).filename().string(), 48) +
                    (plan.problem().batch == 1 ? "" : ", sequence " + std::to_string(sequence)) + ": " +
                    std::to_string(map.query_tokens) + " queries, " + std::to_string(map.key_tokens) + " keys",
                describe_attention(plan.problem(), true),
                "kept: the share of the dense attention mass that lies in the chosen blocks"};
  OutputFile svg(path);
  svg.write(draw_selection(map, mass, text));
  svg.commit();
}

}  // namespace moba::cli
