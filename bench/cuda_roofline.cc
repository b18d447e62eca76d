#include "cuda_roofline.h"

#include <algorithm>

namespace moba::bench {

namespace {

// Matrix products of bfloat16 between dense random matrices, and a copy inside device memory, at the clock that both
// hold for a while. The data sheet says 989e12 and 4.8e12.
constexpr Roofline kH200 = {790e12, 4.26e12};

// Ids that are chosen, over all rows and query heads: a row at position t has t / B + 1 blocks to choose from.
double count_entries(const Plan& plan, const std::vector<std::int64_t>& starts) {
  const Problem& p = plan.problem();
  const std::int64_t block = p.config.block_size;
  double entries = 0;
  for (std::size_t s = 0; s + 1 < starts.size(); ++s) {
    const std::int64_t length = starts[s + 1] - starts[s];
    for (std::int64_t begin = 0; begin < length; begin += block) {
      const std::int64_t rows = std::min(block, length - begin);
      entries += static_cast<double>(rows * std::min(plan.slots(), begin / block + 1));
    }
  }
  return entries * static_cast<double>(p.q_heads);
}

}  // namespace

double Roofline::seconds(double flop, double byte) const { return std::max(flop / flops, byte / bytes); }

std::optional<Roofline> roofline_of(const std::string& device) {
  if (device.find("H200") == std::string::npos) return std::nullopt;
  return kH200;
}

std::vector<std::string> stages_of(const std::string& call) {
  std::vector<std::string> stages;
  if (call == "forward" || call == "training") stages = {"rope", "pool", "gate", "index", "attend", "merge"};
  if (call == "backward" || call == "training") {  // rotates q and k again, and turns dq and dk back
    stages.insert(stages.end(),
                  {"rope", "backward_index", "backward_rows", "backward_products", "backward_queries", "rope"});
  }
  return stages.empty() ? std::vector{call} : stages;
}

std::map<std::string, Amount> amounts(const Plan& plan, const std::vector<std::int64_t>& starts) {
  const Problem& p = plan.problem();
  const Arithmetic work = plan.arithmetic(starts, starts);
  const auto d = static_cast<double>(p.head_dim);
  const double rows = static_cast<double>(p.total_q * p.q_heads), keys = static_cast<double>(p.total_k * p.kv_heads);
  const double q = 2 * d * rows, k = 2 * d * keys;
  const double centroids = 2 * d * static_cast<double>(plan.max_blocks() * p.kv_heads);
  const double entries = count_entries(plan, starts), ids = 4 * rows * static_cast<double>(plan.slots());
  const double partials = entries * (2 * d + 4), list = 4 * entries, results = q + 4 * rows;
  const double slopes = entries * 2 * d, values = 8 * rows;
  std::map<std::string, Amount> all;
  all["pool"] = {0, k + centroids};
  all["gate"] = {work.gate, q + centroids + ids};
  all["index"] = {0, ids + list + ids};  // the ids again, as the places of their partial results
  all["attend"] = {work.attend, q + 2 * k + list + partials};
  all["merge"] = {0, ids + partials + results};
  all["rope"] = {0, p.rope ? 2 * (q + k) : 0};
  all["backward_rows"] = {0, 2 * q + values + 4 * rows};
  all["backward_index"] = all["index"];
  all["backward_products"] = {work.backward, 2 * q + 2 * k + list + values + slopes + 2 * k};
  all["backward_queries"] = {0, ids + slopes + q};
  all["dense"] = {work.dense, q + 2 * k + results};
  all["dense_backward"] = {work.dense_backward, 4 * q + 4 * k + 4 * rows};
  for (const char* const call : {"forward", "backward", "training"}) {
    Amount sum;
    for (const std::string& stage : stages_of(call)) sum = {sum.flop + all[stage].flop, sum.byte + all[stage].byte};
    all[call] = sum;
  }
  return all;
}

}  // namespace moba::bench
