// Step 6, attend: softmax(scale * q k^T) v of each row over the keys of its blocks; and dense, over all its keys.
#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/access.h"
#include "reference/key_sets.h"
#include "reference/reference.h"

namespace moba::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One row: q [d] over the keys and values [len_k, d] of its sequence and key head that are in `spans`. Fills out [d],
// returns the lse. No key, or no score above -inf: out = 0, lse = -inf.
double attend_row(const double* q, const double* keys, const double* values, const std::vector<Span>& spans,
                  double scale, std::int64_t d, std::vector<double>& score, double* out) {
  std::fill_n(out, d, 0.0);
  score.clear();
  for (const Span& span : spans) {
    for (std::int64_t j = span.begin; j < span.end; ++j) score.push_back(scale * dot(q, &keys[j * d], d));
  }
  if (std::all_of(score.begin(), score.end(), [](double s) { return s == -kInfinity; })) return -kInfinity;

  double most = -kInfinity, sum = 0.0;
  for (const double s : score) most = std::max(most, s);
  const double* s = score.data();
  for (const Span& span : spans) {
    for (std::int64_t j = span.begin; j < span.end; ++j) {
      const double p = std::exp(*s++ - most);
      sum += p;
      for (std::int64_t c = 0; c < d; ++c) out[c] += p * values[j * d + c];
    }
  }
  for (std::int64_t c = 0; c < d; ++c) out[c] /= sum;
  return most + std::log(sum);
}

Rows attend_all(const Call& call, const KeySets& keys_of) {
  const std::int64_t tokens = call.q.shape[0], heads = call.q.shape[1], d = call.q.shape[2], group = call.plan.group;
  Rows rows{std::vector<double>(static_cast<std::size_t>(tokens * heads * d)),
            std::vector<double>(static_cast<std::size_t>(heads * tokens))};
  std::vector<double> score;
  for (const Sequence& s : call.sequences) {
    for (std::int64_t key_head = 0; key_head < heads / group; ++key_head) {
      const std::vector<double> keys = widen(call.k, s.k_begin, s.k_len, key_head);
      const std::vector<double> values = widen(call.v, s.k_begin, s.k_len, key_head);
      for (std::int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        const std::vector<double> queries = widen(call.q, s.q_begin, s.q_len, head);
        for (std::int64_t i = 0; i < s.q_len; ++i) {
          const std::int64_t token = s.q_begin + i;
          rows.lse[head * tokens + token] =
              attend_row(&queries[i * d], keys.data(), values.data(), keys_of.of(s, token, head), call.plan.scale, d,
                         score, &rows.out[(token * heads + head) * d]);
        }
      }
    }
  }
  return rows;
}

void round(const Rows& rows, const Outputs& outputs) {
  const Tensor& out = outputs.out;
  const std::int64_t tokens = out.shape[0], heads = out.shape[1], d = out.shape[2];
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const double* row = &rows.out[(token * heads + head) * d];
      for (std::int64_t c = 0; c < d; ++c) store(out, token, head, c, static_cast<float>(row[c]));
      if (outputs.lse.given()) {
        static_cast<float*>(outputs.lse.data)[at(outputs.lse, head, token)] =
            static_cast<float>(rows.lse[head * tokens + token]);
      }
    }
  }
}

}  // namespace

Rows attend_f64(const Call& call, const Selection& selection) { return attend_all(call, KeySets(call, selection)); }

Rows dense_f64(const Call& call) { return attend_all(call, KeySets(call)); }

void attend(const Call& call, const Selection& selection, const Outputs& outputs) {
  round(attend_f64(call, selection), outputs);
}

void dense(const Call& call, const Outputs& outputs) { round(dense_f64(call), outputs); }

}  // namespace moba::reference
