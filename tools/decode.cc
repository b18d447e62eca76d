// moba decode: a sequence of a file through a KV cache, token by token after a prefill: speed, bytes read, and the same
// results as one prefill.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "attention_file.h"
#include "commands.h"
#include "describe.h"
#include "memory_use.h"
#include "moba/error.h"
#include "prefill_check.h"
#include "replay.h"
#include "stages.h"
#include "text.h"
#include "views.h"

namespace moba::cli {
namespace {

// Which tokens are fed, and how.
struct Feeding {
  Feeding(const DecodeArguments& arguments, std::int64_t length) {
    const auto refuse = [](const char* option, std::int64_t was, const std::string& allowed) {
      throw Error(std::string(option) + ": is " + std::to_string(was) + "; allowed: " + allowed);
    };
    prefill = arguments.prefill.value_or(std::min(length / 2, length - std::min(arguments.tokens.value_or(0), length)));
    if (prefill > length)
      refuse("--prefill", prefill, "0 to " + std::to_string(length) + ", the tokens of the sequence");
    tokens = arguments.tokens.value_or(length - prefill);
    if (tokens > length - prefill) {
      refuse("--tokens", tokens,
             "0 to " + std::to_string(length - prefill) + ", what the prefill leaves of the sequence");
    }
    if (total() == 0) refuse("--tokens", 0, "1 or more, where --prefill is 0");
  }

  std::int64_t total() const { return prefill + tokens; }

  std::int64_t prefill, tokens;
};

// The tokens of the file's sequence that are fed.
Inputs sequence_of(const DecodeArguments& arguments, const AttentionFile& file) {
  // A plan of the whole file checks the offsets by which it is cut up.
  Plan(file.problem(arguments.attention), arguments.attention.options).arithmetic(file.starts_q, file.starts_k);
  const Inputs inputs = file.sequence(arguments.sequence);
  const std::int64_t q_len = inputs.q.shape[0], k_len = inputs.k.shape[0];
  const std::string sequence = "sequence " + std::to_string(arguments.sequence);
  if (q_len != k_len) {
    throw Error(sequence + ": has " + std::to_string(q_len) + " queries, " + std::to_string(k_len) +
                " keys; allowed: as many, for every token to be decoded");
  }
  if (q_len == 0) throw Error(sequence + ": has no tokens; allowed: 1 or more");
  return inputs;
}

Inputs first_tokens(const Inputs& inputs, std::int64_t tokens) {
  Inputs first;
  first.q = rows_of(inputs.q, 0, tokens);
  first.k = rows_of(inputs.k, 0, tokens);
  first.v = rows_of(inputs.v, 0, tokens);
  return first;
}

// The tokens as one prefill of one sequence.
Problem prefill_problem(const Inputs& inputs, const AttentionOptions& attention) {
  Problem problem;
  problem.dtype = inputs.q.dtype;
  problem.q_heads = inputs.q.shape[1];
  problem.kv_heads = inputs.k.shape[1];
  problem.head_dim = inputs.q.shape[2];
  problem.total_q = problem.total_k = inputs.q.shape[0];
  problem.config = attention.config;
  problem.rope = attention.rope;
  return problem;
}

CacheProblem cache_problem(const Problem& whole, std::int64_t new_tokens, std::int64_t top_k) {
  CacheProblem problem;
  problem.dtype = whole.dtype;
  problem.q_heads = whole.q_heads;
  problem.kv_heads = whole.kv_heads;
  problem.head_dim = whole.head_dim;
  problem.max_new_tokens = std::max<std::int64_t>(1, new_tokens);
  problem.max_length = whole.total_k;
  problem.config = whole.config;
  problem.config.top_k = top_k;
  problem.rope = whole.rope;
  return problem;
}

// The plans of a comparison: MoBA and full attention over one cache, and the prefill that both could have been.
struct Plans {
  Plans(const Inputs& inputs, const AttentionOptions& attention, const Feeding& feeding)
      : whole(prefill_problem(inputs, attention), attention.options),
        moba(cache_problem(whole.problem(), feeding.prefill, attention.config.top_k), attention.options),
        dense(cache_problem(whole.problem(), 1, std::numeric_limits<std::int32_t>::max()), attention.options) {}

  std::size_t workspace_bytes() const { return std::max(moba.workspace_bytes(), dense.workspace_bytes()); }

  const Plan whole;
  const CachePlan moba, dense;
};

// What a replay and its check take beside the file.
double bytes_needed(const Plans& plans, std::int64_t page_size) {
  const MemoryUse use = memory_use(plans.whole);
  return ReplayCache::bytes(plans.moba, page_size) + static_cast<double>(plans.workspace_bytes()) + 2 * use.out +
         use.ids + use.staged();
}

struct Seconds {
  double prefill = 0, moba = 0, dense = 0;
};

// Feeds the prefill, then the other tokens again and again, with MoBA and with full attention in turn: the cache holds
// the same after each of them. The fastest pass is the one that other programs disturbed least; what came out is that
// of the first, which finds no later token in the cache.
Seconds feed(const Plans& plans, const Inputs& inputs, const Feeding& feeding, int passes, ReplayCache& cache,
             const Replayed& to, Progress& progress) {
  const Buffer workspace(plans.workspace_bytes());
  const Replayed unread(plans.dense, feeding.total(), false);
  Seconds seconds;
  progress.stage("prefill");
  seconds.prefill = replay(plans.moba, inputs, 0, feeding.prefill, feeding.prefill, cache, to, workspace.span());
  const auto one_by_one = [&](const CachePlan& plan, const Replayed& into) {
    return replay(plan, inputs, feeding.prefill, feeding.tokens, 1, cache, into, workspace.span());
  };
  for (int i = 0; i < passes; ++i) {
    progress.stage("decode");
    const double moba = one_by_one(plans.moba, i == 0 ? to : unread);
    progress.stage("dense decode");
    const double dense = one_by_one(plans.dense, unread);
    seconds.moba = i == 0 ? moba : std::min(moba, seconds.moba);
    seconds.dense = i == 0 ? dense : std::min(dense, seconds.dense);
  }
  return seconds;
}

void print_feeding(const DecodeArguments& arguments, const Feeding& feeding, const Seconds& seconds) {
  std::printf("sequence %s: %s tokens in one call, %s; then %s one by one; cache %s\n",
              std::to_string(arguments.sequence).c_str(), std::to_string(feeding.prefill).c_str(),
              format_seconds(seconds.prefill).c_str(), std::to_string(feeding.tokens).c_str(),
              arguments.page_size == 0 ? "contiguous"
                                       : ("in pages of " + std::to_string(arguments.page_size) + " tokens").c_str());
}

void print_rates(const Plans& plans, const Feeding& feeding, const Seconds& seconds, const Replayed& moba) {
  if (feeding.tokens == 0) return;
  const auto tokens = static_cast<double>(feeding.tokens);
  const double read = mean_bytes_read(plans.moba, moba.ids, feeding.prefill);
  const double read_dense = mean_bytes_read_dense(plans.dense, feeding.prefill, feeding.tokens);
  std::printf("\n%-8s %12s %12s %12s %10s\n", "decode", "time/token", "tokens/s", "read/token", "GB/s");
  const auto line = [&](const char* name, double time, double bytes) {
    std::printf("%-8s %12s %12.1f %12s %10.2f\n", name, format_seconds(time / tokens).c_str(), tokens / time,
                format_bytes(bytes).c_str(), bytes * tokens / time / 1e9);
  };
  line("MoBA", seconds.moba, read);
  line("dense", seconds.dense, read_dense);
  std::printf("\ndense / MoBA: %.2f in time, %.2f in bytes read\n", seconds.dense / seconds.moba, read_dense / read);
}

void print_check(const PrefillCheck& check) {
  std::printf("\nagainst one prefill of the same tokens\nsame blocks in %s of %s rows\n",
              std::to_string(check.same_ids).c_str(), std::to_string(check.rows).c_str());
  std::printf("out: largest error of a row %.2e, allowed %.2e\n", check.error, check.allowed);
  if (check.not_finite > 0) {
    std::printf("left out: what is NaN or infinite on both sides, in %s rows\n",
                std::to_string(check.not_finite).c_str());
  }
}

}  // namespace

void decode(const DecodeArguments& arguments) {
  require_host(arguments.attention.options, "there is no cache on a GPU yet");
  const AttentionFile file = read_attention_file(arguments.input);
  const Inputs sequence = sequence_of(arguments, file);
  const Feeding feeding(arguments, sequence.q.shape[0]);
  const Inputs inputs = first_tokens(sequence, feeding.total());
  const Plans plans(inputs, arguments.attention, feeding);
  require_memory(memory_use(Plan(file.problem(arguments.attention), arguments.attention.options)).inputs() +
                 bytes_needed(plans, arguments.page_size));
  std::printf("%s: %s\n", arguments.input.c_str(), file.describe().c_str());
  std::printf("%s; %s\n", describe_attention(plans.whole.problem(), true).c_str(), plans.moba.kernels().c_str());
  std::fflush(stdout);  // what follows can take a while

  ReplayCache cache(plans.moba, arguments.page_size);
  const Replayed replayed(plans.moba, feeding.total(), true);
  Seconds seconds;
  {
    Progress progress;
    seconds = feed(plans, inputs, feeding, arguments.repeat, cache, replayed, progress);
  }
  print_feeding(arguments, feeding, seconds);
  print_rates(plans, feeding, seconds, replayed);
  std::fflush(stdout);

  StagedForward forward(plans.whole, inputs);
  {
    Progress progress;
    forward.run(progress);
  }
  const PrefillCheck check = check_against_prefill(plans.whole, forward, replayed);
  print_check(check);
  if (!check.passed()) throw Error("decode: does not give what one prefill gives, see above");
}

}  // namespace moba::cli
