#include "accuracy.h"

#include <algorithm>
#include <cstring>

#include "memory_use.h"
#include "stages.h"
#include "views.h"

namespace moba::cli {
namespace {

// The last query tokens of a batch, as a batch of as many sequences: queries are aligned to the end of their sequence,
// so what is left of a sequence keeps its positions.
struct LastTokens {
  LastTokens(const AttentionFile& file, std::int64_t first) : inputs(file.inputs) {
    inputs.q = rows_of(inputs.q, first, inputs.q.shape[0] - first);
    starts = Buffer(file.starts_q.size() * sizeof(std::int32_t));
    for (std::size_t i = 0; i < file.starts_q.size(); ++i) {
      starts.as<std::int32_t>()[i] = static_cast<std::int32_t>(std::max<std::int64_t>(0, file.starts_q[i] - first));
    }
    if (inputs.cu_seqlens_q.given()) inputs.cu_seqlens_q.data = starts.data();
  }

  Inputs inputs;
  Buffer starts;
};

// The reference's plans for the last `tokens` query tokens: as `plan`, for the selection; and in float32 with q and k
// as they are, for the attention.
struct ReferencePlans {
  ReferencePlans(const Plan& plan, std::int64_t tokens)
      : own(last_tokens(plan.problem(), tokens), reference_options()),
        exact(exact_problem(own.problem()), reference_options()) {}

  const Plan own, exact;

 private:
  static Problem last_tokens(Problem problem, std::int64_t tokens) {
    problem.total_q = std::min(tokens, problem.total_q);
    problem.max_seqlen_q = std::min(problem.max_seqlen_q, problem.total_q);
    return problem;
  }
};

}  // namespace

std::int64_t equal_rows(const ConstTensor& ids, const ConstTensor& others) {
  const std::int64_t rows = ids.shape[0] * ids.shape[1], slots = ids.shape[2];
  const auto* a = static_cast<const std::int32_t*>(ids.data);
  const auto* b = static_cast<const std::int32_t*>(others.data);
  std::int64_t equal = 0;
  for (std::int64_t row = 0; row < rows; ++row)
    equal += std::equal(a + row * slots, a + (row + 1) * slots, b + row * slots);
  return equal;
}

double accuracy_bytes(const Plan& plan, std::int64_t tokens) {
  const ReferencePlans plans(plan, tokens);
  const MemoryUse own = memory_use(plans.own), exact = memory_use(plans.exact);
  // Inside, the reference holds its result in float64, so too the rows of one key head, and the blocks of each row.
  const Problem& problem = plans.exact.problem();
  const double rows = exact.lse / sizeof(float), slots = static_cast<double>(plans.exact.slots());
  const double inside = 2 * (exact.out + exact.lse) + 2 * exact.inputs() / static_cast<double>(problem.kv_heads) +
                        rows * (16 * slots + 64);
  return own.staged() + exact.inputs() + exact.dense() + static_cast<double>(plans.exact.selection_bytes()) + inside;
}

Accuracy check_accuracy(const Plan& plan, const AttentionFile& file, const ConstTensor& ids,
                        const ConstTensor& moba_out, const ConstTensor& dense_out, std::int64_t tokens,
                        Progress& progress) {
  const ReferencePlans plans(plan, tokens);
  const Plan &own = plans.own, &exact = plans.exact;
  Accuracy result;
  result.tokens = own.problem().total_q;
  result.rows = result.tokens * own.problem().q_heads;
  const std::int64_t first = plan.problem().total_q - result.tokens;
  const ConstTensor chosen = rows_of(ids, first, result.tokens);

  // The reference's own way from q and k to the chosen blocks.
  const LastTokens last(file, first);
  StagedForward routed(own, last.inputs);
  routed.route(progress);
  result.same_selection = equal_rows(chosen, routed.selection().ids);

  // Attention over the blocks that were chosen by `plan`, and over everything, from the reference's q and k.
  Buffer q, k, v;
  Inputs wide = routed.rotated();
  wide.q = widen(wide.q, q);
  wide.k = widen(wide.k, k);
  wide.v = widen(wide.v, v);
  const Buffer workspace(exact.workspace_bytes()), memory(exact.selection_bytes());
  const Selection same = make_selection(exact, memory.span());
  std::memcpy(same.ids.data, chosen.data, static_cast<std::size_t>(result.rows * exact.slots()) * sizeof(std::int32_t));
  const Results expected(exact);
  progress.stage("float64 MoBA");
  moba::index(exact, wide, same, workspace.span());
  moba::attend(exact, wide, same, expected.outputs, workspace.span());
  result.moba = row_errors(rows_of(moba_out, first, result.tokens), expected.outputs.out);
  progress.stage("float64 dense");
  moba::dense(exact, wide, expected.outputs, workspace.span());
  result.dense = row_errors(rows_of(dense_out, first, result.tokens), expected.outputs.out);
  return result;
}

}  // namespace moba::cli
