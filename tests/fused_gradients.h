// Gradients that share a buffer [tokens, heads, d].
#pragma once

#include <cmath>
#include <cstdint>

#include "support.h"

namespace moba::test {

// Heads `first`, `first + step` ... of the buffer, as a tensor of their own.
struct Heads {
  std::int64_t first, step, count;

  Tensor of(Tensor all) const {
    const auto size = static_cast<std::int64_t>(size_in_bytes(all.dtype));
    all.data = static_cast<std::byte*>(all.data) + first * all.stride[1] * size;
    all.shape[1] = count, all.stride[1] *= step;
    return all;
  }
  bool hold(const Array& expected, const Array& all) const {
    for (std::int64_t token = 0; token < expected.dim(0); ++token) {
      for (std::int64_t head = 0; head < count; ++head) {
        for (std::int64_t i = 0; i < expected.dim(2); ++i) {
          if (all.get(token, first + head * step, i) != expected.get(token, head, i)) return false;
        }
      }
    }
    return true;
  }
};

// Where dq (4 heads), dk and dv (2 each) lie in a buffer of 10 heads, of which head 4 and the last are nobody's: behind
// one another, or dk and dv in turn.
struct FusedGradients {
  static constexpr std::int64_t kHeads = 10;
  Heads dq{0, 1, 4}, dk{5, 1, 2}, dv{7, 1, 2};

  explicit FusedGradients(bool in_turn) {
    if (in_turn) dk = {5, 2, 2}, dv = {6, 2, 2};
  }
  Gradients of(const Tensor& all) const { return {dq.of(all), dk.of(all), dv.of(all)}; }
  bool hold(const Slopes& expected, const Array& all) const {
    for (std::int64_t token = 0; token < all.dim(0); ++token) {
      for (std::int64_t i = 0; i < all.dim(2); ++i) {  // nobody's are as all memory was at first
        if (!std::isnan(all.get(token, 4, i)) || !std::isnan(all.get(token, kHeads - 1, i))) return false;
      }
    }
    return dq.hold(expected.dq, all) && dk.hold(expected.dk, all) && dv.hold(expected.dv, all);
  }
};

}  // namespace moba::test
