// The rules by which results are compared, and the float64 results they are compared with.
#include <algorithm>
#include <cmath>
#include <limits>

#include "support.h"

namespace moba::test {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Sequences of a case: tokens and blocks before each.
struct Place {
  std::int64_t q_begin = 0, q_len = 0, k_begin = 0, k_len = 0, block_begin = 0, blocks = 0;
};

std::vector<Place> places(const std::vector<std::int64_t>& q, const std::vector<std::int64_t>& k,
                          std::int64_t block_size) {
  std::vector<Place> all;
  Place at;
  for (std::size_t s = 0; s < q.size(); ++s) {
    at.q_len = q[s];
    at.k_len = k[s];
    at.blocks = k[s] / block_size + (k[s] % block_size != 0);
    all.push_back(at);
    at.q_begin += at.q_len;
    at.k_begin += at.k_len;
    at.block_begin += at.blocks;
  }
  return all;
}

double row_of(const std::vector<double>& scores, const std::vector<std::int64_t>& keys, const Array& v,
              std::int64_t head, double* out) {
  const std::int64_t d = v.dim(2);
  std::fill_n(out, d, 0.0);
  double most = -kInfinity, total = 0;
  for (const double s : scores) most = std::max(most, s);
  if (std::ranges::all_of(scores, [](double s) { return s == -kInfinity; })) return -kInfinity;
  for (const double s : scores) total += std::exp(s - most);
  for (std::size_t j = 0; j < keys.size(); ++j) {
    const double p = std::exp(scores[j] - most) / total;
    for (std::int64_t c = 0; c < d; ++c) out[c] += p * v.get(keys[j], head, c);
  }
  return most + std::log(total);
}

}  // namespace

Call call_of(const Plan& plan, const Inputs& inputs) {
  const Problem& p = plan.problem();
  const auto cu = [&](const ConstTensor& t, std::int64_t total) {
    const auto* entries = static_cast<const std::int32_t*>(t.data);
    return t.given() ? std::vector<std::int64_t>(entries, entries + p.batch + 1) : std::vector<std::int64_t>{0, total};
  };
  const auto q = cu(inputs.cu_seqlens_q, p.total_q), k = cu(inputs.cu_seqlens_k, p.total_k);
  std::vector<std::int64_t> q_lengths, k_lengths;
  for (std::int64_t s = 0; s < p.batch; ++s) {
    q_lengths.push_back(q[s + 1] - q[s]);
    k_lengths.push_back(k[s + 1] - k[s]);
  }
  Call call{plan.impl(), inputs.q, inputs.k, inputs.v, {}, {}, {}, {}, {}};
  for (const Place& s : places(q_lengths, k_lengths, p.config.block_size)) {
    call.sequences.push_back({s.q_begin, s.q_len, s.k_begin, s.k_len, s.block_begin, s.blocks});
  }
  return call;
}

reference::Rows attend_f64(Runner& run, const Inputs& inputs, Chosen& chosen) {
  return reference::attend_f64(call_of(run.plan(), inputs), chosen.selection());
}

reference::Rows dense_f64(Runner& run, const Inputs& inputs) {
  return reference::dense_f64(call_of(run.plan(), inputs));
}

reference::Rows brute_force(const Case& c, const Data& data, const Chosen* chosen) {
  const std::int64_t tokens = c.total_q(), d = c.head_dim, group = c.q_heads / c.kv_heads;
  const double scale = scale_of(c);
  reference::Rows rows{std::vector<double>(static_cast<std::size_t>(tokens * c.q_heads * d)),
                       std::vector<double>(static_cast<std::size_t>(tokens * c.q_heads))};
  for (const Place& s : places(c.q_lengths, c.k_lengths, c.config.block_size)) {
    for (std::int64_t i = 0; i < s.q_len; ++i) {
      for (std::int64_t head = 0; head < c.q_heads; ++head) {
        const std::int64_t token = s.q_begin + i, position = s.k_len - s.q_len + i;
        std::vector<double> scores;
        std::vector<std::int64_t> keys;
        for (std::int64_t j = 0; j < s.k_len; ++j) {
          if (c.config.causal && j > position) continue;
          const std::int64_t ids_head = chosen && chosen->ids.dim(1) == c.kv_heads ? head / group : head;
          if (chosen != nullptr && !std::ranges::count(chosen->row(token, ids_head), j / c.config.block_size)) continue;
          double score = 0;
          for (std::int64_t x = 0; x < d; ++x) {
            score += static_cast<double>(data.q.get(token, head, x)) * data.k.get(s.k_begin + j, head / group, x);
          }
          scores.push_back(scale * score);
          keys.push_back(s.k_begin + j);
        }
        rows.lse[head * tokens + token] =
            row_of(scores, keys, data.v, head / group, &rows.out[(token * c.q_heads + head) * d]);
      }
    }
  }
  return rows;
}

Array noise_dout(const Case& c) {
  Array dout(c.dtype, {c.total_q(), c.q_heads, c.head_dim}, c.inputs);
  dout.fill(c.seed + 1000);
  return dout;
}

reference::GradientRows backward_f64(Runner& run, const Inputs& inputs, Chosen* chosen, const Array& dout,
                                     const Attention* results) {
  const Call call = call_of(run.plan(), inputs);
  const Selection selection = chosen ? chosen->selection() : Selection{};
  const reference::Rows rows = results  ? reference::Rows{results->out.numbers(), results->lse.numbers()}
                               : chosen ? reference::attend_f64(call, selection)
                                        : reference::dense_f64(call);
  return chosen ? reference::backward_f64(call, selection, rows, dout.numbers())
                : reference::dense_backward_f64(call, rows, dout.numbers());
}

double gradient_bound(DType dtype) { return dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 4e-3 : 2e-2; }

namespace {

double norm(const double* row, std::int64_t d) {
  double sum = 0;
  for (std::int64_t c = 0; c < d; ++c) sum += row[c] * row[c];
  return std::sqrt(sum);
}

// The greatest norm of a row of x.
double most(const Array& x) {
  const std::vector<double> numbers = x.numbers();
  double greatest = 0;
  for (std::int64_t row = 0; row < std::ssize(numbers); row += x.dim(2)) {
    greatest = std::max(greatest, norm(&numbers[row], x.dim(2)));
  }
  return greatest;
}

::testing::AssertionResult rows_close(const char* name, const Array& got, const std::vector<double>& expected,
                                      double bound, double least) {
  const std::vector<double> is = got.numbers();
  const std::int64_t d = got.dim(2), rows = got.dim(0) * got.dim(1);
  const double root = std::sqrt(static_cast<double>(std::max<std::int64_t>(rows, 1)));
  const double whole = norm(expected.data(), rows * d), average = whole / root;
  double whole_error = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<double> error(is.begin() + row * d, is.begin() + (row + 1) * d);
    for (std::int64_t c = 0; c < d; ++c) error[c] -= expected[row * d + c];
    const double allowed = std::max(bound * std::max(norm(&expected[row * d], d), average), least);
    whole_error = std::hypot(whole_error, norm(error.data(), d));
    if (norm(error.data(), d) <= allowed) continue;
    return ::testing::AssertionFailure() << name << ", token " << row / got.dim(1) << ", head " << row % got.dim(1)
                                         << ": error " << norm(error.data(), d) << ", allowed " << allowed << ", norm "
                                         << norm(&expected[row * d], d) << ", average " << average;
  }
  if (whole_error > std::max(bound * whole, least * root)) {
    return ::testing::AssertionFailure() << name << ": error " << whole_error << " of all, norm " << whole;
  }
  return ::testing::AssertionSuccess();
}

}  // namespace

::testing::AssertionResult close(const Slopes& got, const reference::GradientRows& expected, const Data& data,
                                 const Array& dout, double scale, double bound, double extra) {
  const double slope = (2e-7 + 2 * extra) * std::abs(scale) * most(dout) * most(data.v);
  const double rows = static_cast<double>(dout.dim(0) * dout.dim(1)) / static_cast<double>(data.k.dim(1));  // of a key
  const auto dq = rows_close("dq", got.dq, expected.dq, bound + extra, slope * most(data.k));
  if (!dq) return dq;
  const auto dk = rows_close("dk", got.dk, expected.dk, bound + extra, slope * most(data.q) * std::sqrt(rows));
  if (!dk) return dk;
  return rows_close("dv", got.dv, expected.dv, bound + extra, 0);
}

double tolerance(DType dtype) { return dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 2e-3 : 1e-2; }

::testing::AssertionResult close(const Attention& got, const reference::Rows& expected, DType dtype, double extra,
                                 double lse_bound) {
  const std::int64_t tokens = got.out.dim(0), heads = got.out.dim(1), d = got.out.dim(2);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const auto fail = [&] { return ::testing::AssertionFailure() << "token " << token << ", head " << head << ": "; };
      const double* row = &expected.out[(token * heads + head) * d];
      double error = 0, norm = 0;
      for (std::int64_t c = 0; c < d; ++c) {
        const double is = got.out.get(token, head, c), should = row[c];
        if (std::isnan(should) ? !std::isnan(is) : std::isinf(should) ? std::isfinite(is) : !std::isfinite(is)) {
          return fail() << "out[" << c << "] is " << is << ", expected " << should;
        }
        if (!std::isfinite(should)) continue;
        error += (is - should) * (is - should);
        norm += should * should;
      }
      if (!(std::sqrt(error) <= (tolerance(dtype) + extra) * std::sqrt(norm))) {
        return fail() << "relative error of out is " << std::sqrt(error / norm) << ", norm " << std::sqrt(norm);
      }
      const double lse = got.lse.get(head, token), should = expected.lse[head * tokens + token];
      const bool fits = std::isnan(should) ? std::isnan(lse)
                        : std::isinf(should)
                            ? lse == should
                            : std::abs(lse - should) <= lse_bound * std::max(1.0, std::abs(should)) + extra;
      if (!fits) return fail() << "lse is " << lse << ", expected " << should;
    }
  }
  return ::testing::AssertionSuccess();
}

double score_error(const Data& data, double scale) {
  double q_most = 0, k_most = 0;
  const auto most_of = [](const Array& x, double& most) {
    for (std::int64_t i = 0; i < x.dim(0); ++i) {
      for (std::int64_t j = 0; j < x.dim(1); ++j) {
        double norm = 0;
        for (std::int64_t l = 0; l < x.dim(2); ++l) norm += static_cast<double>(x.get(i, j, l)) * x.get(i, j, l);
        if (std::isfinite(norm)) most = std::max(most, std::sqrt(norm));
      }
    }
  };
  most_of(data.q, q_most);
  most_of(data.k, k_most);
  return 4 * 0x1p-24 * std::abs(scale) * q_most * k_most;  // sum |q_i k_i| <= |q| |k|
}

::testing::AssertionResult well_formed(const Case& c, const Chosen& chosen) {
  const std::int64_t b = c.config.block_size, k = c.config.top_k;
  for (const Place& s : places(c.q_lengths, c.k_lengths, b)) {
    for (std::int64_t i = 0; i < s.q_len; ++i) {
      const std::int64_t token = s.q_begin + i, position = s.k_len - s.q_len + i;
      for (std::int64_t head = 0; head < c.q_heads; ++head) {
        const auto fail = [&] {
          return ::testing::AssertionFailure() << "token " << token << ", head " << head << ": ";
        };
        const std::vector<std::int32_t> row = chosen.row(token, head);
        const std::int64_t reach = c.config.causal ? (position < 0 ? 0 : position / b + 1) : s.blocks;
        if (std::ssize(row) != std::min(k, reach)) return fail() << row.size() << " blocks, not " << std::min(k, reach);
        if (chosen.counts.as<std::int32_t>(token, head) != std::ssize(row)) return fail() << "the count is wrong";
        if (std::ranges::adjacent_find(row, std::greater_equal<>()) != row.end()) return fail() << "not ascending";
        if (!row.empty() && (row.front() < 0 || row.back() >= reach)) return fail() << "a block out of reach";
        if (c.config.causal && !row.empty() && row.back() != position / b) return fail() << "without the own block";
        for (std::int64_t slot = std::ssize(row); slot < chosen.ids.dim(2); ++slot) {
          if (chosen.ids.as<std::int32_t>(token, head, slot) != -1)
            return fail() << "ids that are not -1 after the first";
        }
      }
    }
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult explained(const Case& c, const Inputs& inputs, const Array& centroids,
                                     const Chosen& expected, const Chosen& got) {
  if (const auto result = well_formed(c, got); !result) return result;
  const std::int64_t group = c.q_heads / c.kv_heads, d = c.head_dim;
  const auto q = [&](std::int64_t token, std::int64_t head, std::int64_t x) {
    return load_float(inputs.q.data, c.dtype, token * inputs.q.stride[0] + head * inputs.q.stride[1] + x);
  };
  for (const Place& s : places(c.q_lengths, c.k_lengths, c.config.block_size)) {
    for (std::int64_t token = s.q_begin; token < s.q_begin + s.q_len; ++token) {
      const std::int64_t position = s.k_len - s.q_len + token - s.q_begin;
      for (std::int64_t head = 0; head < c.q_heads; ++head) {
        const auto fail = [&] {
          return ::testing::AssertionFailure() << "token " << token << ", head " << head << ": ";
        };
        const auto centroid = [&](std::int64_t b, std::int64_t x) {
          return static_cast<double>(centroids.get(s.block_begin + b, head / group, x));
        };
        const auto score = [&](std::int64_t b, bool magnitude) {
          double sum = 0;
          for (std::int64_t x = 0; x < d; ++x) {
            const double product = q(token, head, x) * centroid(b, x);
            sum += magnitude ? std::abs(product) : product;
          }
          return sum;
        };
        const std::vector<std::int32_t> ours = got.row(token, head), theirs = expected.row(token, head);
        std::vector<std::int32_t> more, fewer;  // chosen here only, there only
        std::ranges::set_difference(ours, theirs, std::back_inserter(more));
        std::ranges::set_difference(theirs, ours, std::back_inserter(fewer));
        for (const std::int32_t a : more) {
          for (const std::int32_t b : fewer) {
            // What each sum of d terms may be off by, and what underflows.
            const double bound = static_cast<double>(d) * (0x1p-24 * (score(a, true) + score(b, true)) + 0x1p-148);
            if (!(std::abs(score(a, false) - score(b, false)) <= bound)) {
              return fail() << "block " << a << " (score " << score(a, false) << ") is chosen instead of " << b << " ("
                            << score(b, false) << ")";
            }
          }
        }
        // Where nothing differs the reference's rule for ties was followed.
        for (const std::int32_t a : more) {
          const std::int64_t reach = c.config.causal ? position / c.config.block_size : s.blocks;
          for (std::int32_t b = a + 1; b < reach; ++b) {
            bool same = true;
            for (std::int64_t x = 0; x < d && same; ++x) same = centroid(a, x) == centroid(b, x);
            if (same && !std::ranges::count(ours, b))
              return fail() << "block " << a << " is chosen, its equal " << b << " not";
          }
        }
      }
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace moba::test
