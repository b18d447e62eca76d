// backward: dq, dk and dv of sum(dout * out), the selection a constant; and dense_backward, over all keys.
#include <array>
#include <cmath>
#include <limits>

#include "reference/access.h"
#include "reference/key_sets.h"
#include "reference/reference.h"
#include "rope_table.h"

namespace moba::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// to += factor * x, [d].
void add(double factor, const double* x, std::int64_t d, double* to) {
  for (std::int64_t c = 0; c < d; ++c) to[c] += factor * x[c];
}

// One row's operands, [d] each, and its lse.
struct Row {
  const double *q, *out, *dout;
  double lse;
};

// Adds what one row gives: to its dq [d], and to dk and dv [len_k, d] of its sequence and key head. All without scale.
void backward_row(const Row& row, const double* keys, const double* values, const std::vector<Span>& spans,
                  double scale, std::int64_t d, double* dq, double* dk, double* dv) {
  if (row.lse == -kInfinity) return;  // saw no key, or none with a score above -inf
  const double delta = dot(row.dout, row.out, d);
  for (const Span& span : spans) {
    for (std::int64_t j = span.begin; j < span.end; ++j) {
      const double p = std::exp(scale * dot(row.q, &keys[j * d], d) - row.lse);
      if (p == 0) continue;  // takes no part, even where it would meet what is not finite
      const double ds = p * (dot(row.dout, &values[j * d], d) - delta);
      add(p, row.dout, d, &dv[j * d]);
      add(ds, &keys[j * d], d, dq);
      add(ds, row.q, d, &dk[j * d]);
    }
  }
}

// x [rows, heads, d] += from [count, d], rows from `begin` on of one head, times a factor.
void scatter(const std::vector<double>& from, double factor, std::int64_t begin, std::int64_t head, std::int64_t heads,
             std::int64_t d, std::vector<double>& x) {
  for (std::int64_t i = 0; i < std::ssize(from) / d; ++i)
    add(factor, &from[i * d], d, &x[((begin + i) * heads + head) * d]);
}

// The gradient of a rotation: its transpose, on one token of x [tokens, heads, d].
void turn_back(const Plan::Impl& plan, std::int64_t position, std::int64_t token, std::int64_t heads,
               std::vector<double>& x) {
  std::array<float, RopeTable::kMaxPairs> cos, sin;
  plan.rope->rows(position, 1, cos.data(), sin.data());
  const std::int64_t pairs = plan.rope->pairs(), d = plan.problem.head_dim;
  const bool half_split = plan.problem.rope->style == RopeStyle::half_split;
  for (std::int64_t head = 0; head < heads; ++head) {
    double* row = &x[(token * heads + head) * d];
    for (std::int64_t i = 0; i < pairs; ++i) {
      double &first = row[half_split ? i : 2 * i], &second = row[half_split ? i + pairs : 2 * i + 1];
      const double dy0 = first, dy1 = second;
      first = dy0 * cos[i] + dy1 * sin[i];
      second = dy1 * cos[i] - dy0 * sin[i];
    }
  }
}

void turn_back(const Call& call, GradientRows& gradients) {
  for (const Sequence& s : call.sequences) {
    for (std::int64_t i = 0; i < s.q_len; ++i) {
      turn_back(call.plan, s.first_position() + i, s.q_begin + i, call.q.shape[1], gradients.dq);
    }
    for (std::int64_t j = 0; j < s.k_len; ++j) turn_back(call.plan, j, s.k_begin + j, call.k.shape[1], gradients.dk);
  }
}

GradientRows backward_all(const Call& call, const KeySets& keys_of, const Rows& results,
                          const std::vector<double>& dout) {
  const std::int64_t tokens = call.q.shape[0], heads = call.q.shape[1], d = call.q.shape[2], group = call.plan.group;
  const std::int64_t key_heads = heads / group, keys_and_heads = call.k.shape[0] * key_heads;
  GradientRows sum{std::vector<double>(static_cast<std::size_t>(tokens * heads * d)),
                   std::vector<double>(static_cast<std::size_t>(keys_and_heads * d)),
                   std::vector<double>(static_cast<std::size_t>(keys_and_heads * d))};
  for (const Sequence& s : call.sequences) {
    for (std::int64_t key_head = 0; key_head < key_heads; ++key_head) {
      const std::vector<double> keys = widen(call.k, s.k_begin, s.k_len, key_head);
      const std::vector<double> values = widen(call.v, s.k_begin, s.k_len, key_head);
      std::vector<double> dk(keys.size()), dv(keys.size());
      for (std::int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        const std::vector<double> queries = widen(call.q, s.q_begin, s.q_len, head);
        std::vector<double> dq(queries.size());
        for (std::int64_t i = 0; i < s.q_len; ++i) {
          const std::int64_t token = s.q_begin + i, at_row = (token * heads + head) * d;
          const Row row{&queries[i * d], &results.out[at_row], &dout[at_row], results.lse[head * tokens + token]};
          backward_row(row, keys.data(), values.data(), keys_of.of(s, token, head), call.plan.scale, d, &dq[i * d],
                       dk.data(), dv.data());
        }
        scatter(dq, call.plan.scale, s.q_begin, head, heads, d, sum.dq);
      }
      scatter(dk, call.plan.scale, s.k_begin, key_head, key_heads, d, sum.dk);
      scatter(dv, 1.0, s.k_begin, key_head, key_heads, d, sum.dv);
    }
  }
  if (call.plan.rope) turn_back(call, sum);
  return sum;
}

// A tensor [rows, heads, d] as float64, contiguous.
std::vector<double> widen_all(const ConstTensor& x) {
  std::vector<double> wide;
  for (std::int64_t i = 0; i < x.shape[0]; ++i) {
    for (std::int64_t head = 0; head < x.shape[1]; ++head) {
      for (std::int64_t c = 0; c < x.shape[2]; ++c) wide.push_back(load(x, i, head, c));
    }
  }
  return wide;
}

Rows results_of(const Cotangents& given) {
  Rows rows{widen_all(given.out), {}};
  for (std::int64_t head = 0; head < given.lse.shape[0]; ++head) {
    for (std::int64_t token = 0; token < given.lse.shape[1]; ++token) {
      rows.lse.push_back(static_cast<const float*>(given.lse.data)[at(given.lse, head, token)]);
    }
  }
  return rows;
}

void round(const std::vector<double>& x, const Tensor& to) {
  const double* next = x.data();
  for (std::int64_t i = 0; i < to.shape[0]; ++i) {
    for (std::int64_t head = 0; head < to.shape[1]; ++head) {
      for (std::int64_t c = 0; c < to.shape[2]; ++c) store(to, i, head, c, static_cast<float>(*next++));
    }
  }
}

void round(const GradientRows& rows, const Gradients& gradients) {
  round(rows.dq, gradients.dq);
  round(rows.dk, gradients.dk);
  round(rows.dv, gradients.dv);
}

}  // namespace

GradientRows backward_f64(const Call& call, const Selection& selection, const Rows& results,
                          const std::vector<double>& dout) {
  return backward_all(call, KeySets(call, selection), results, dout);
}

GradientRows dense_backward_f64(const Call& call, const Rows& results, const std::vector<double>& dout) {
  return backward_all(call, KeySets(call), results, dout);
}

void backward(const Call& call, const Selection& selection, const Cotangents& given, const Gradients& gradients) {
  round(backward_f64(call, selection, results_of(given), widen_all(given.dout)), gradients);
}

void dense_backward(const Call& call, const Cotangents& given, const Gradients& gradients) {
  round(dense_backward_f64(call, results_of(given), widen_all(given.dout)), gradients);
}

}  // namespace moba::reference
