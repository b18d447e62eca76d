// Sorting networks on registers, and on the registers of two lanes together. All indices are compile-time constants: as
// nested loops the networks left their arrays in local memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "cuda/lanes.cuh"

namespace moba::cuda {

// What is sorted, and which of two comes first.
struct LargestFirst {
  using Type = float;
  static __device__ __forceinline__ float first(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ float second(float a, float b) { return fminf(a, b); }
};
// Two independent bfloat16 sequences, in the halves of each word.
struct LargestFirstPairs {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ Type first(Type a, Type b) { return __hmax2(a, b); }
  static __device__ __forceinline__ Type second(Type a, Type b) { return __hmin2(a, b); }
};
struct SmallestFirst {
  using Type = int;
  static __device__ __forceinline__ int first(int a, int b) { return min(a, b); }
  static __device__ __forceinline__ int second(int a, int b) { return max(a, b); }
};

template <class Order, int n>
__device__ __forceinline__ void exchange(typename Order::Type (&x)[n], int i, int j) {
  const typename Order::Type first = Order::first(x[i], x[j]);
  x[j] = Order::second(x[i], x[j]);
  x[i] = first;
}

// Batcher's odd-even merge sort of n elements, a power of two: 5, 19, 63 exchanges for 4, 8, 16.
template <int n>
struct SortingNetwork {
  int exchanges = 0, i[64] = {}, j[64] = {};
  constexpr SortingNetwork() {
    for (int p = 1; p < n; p *= 2) {
      for (int k = p; k >= 1; k /= 2) {
        for (int base = k % p; base + k < n; base += 2 * k) {
          for (int offset = 0; offset < k; ++offset) {
            const int a = base + offset, b = a + k;
            if (b < n && a / (2 * p) == b / (2 * p)) {
              i[exchanges] = a;
              j[exchanges] = b;
              ++exchanges;
            }
          }
        }
      }
    }
  }
};
template <int n>
inline constexpr SortingNetwork<n> kSortingNetwork{};

template <class Order, int n, int... step>
__device__ __forceinline__ void sort_by(typename Order::Type (&x)[n], std::integer_sequence<int, step...>) {
  (exchange<Order>(x, std::integral_constant<int, kSortingNetwork<n>.i[step]>::value,
                   std::integral_constant<int, kSortingNetwork<n>.j[step]>::value),
   ...);
}
template <class Order, int n>
__device__ __forceinline__ void sort(typename Order::Type (&x)[n]) {
  sort_by<Order>(x, std::make_integer_sequence<int, kSortingNetwork<n>.exchanges>());
}

// Sorts a bitonic sequence.
template <class Order, int n>
__device__ __forceinline__ void sort_bitonic(typename Order::Type (&x)[n]) {
#pragma unroll
  for (int k = n / 2; k >= 1; k /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if ((i & k) == 0) exchange<Order>(x, i, i + k);
    }
  }
}

// The element of rank `rank` (1: the first) in the union of the sorted x and y.
template <class Order, int rank, int n>
__device__ __forceinline__ typename Order::Type ranked_of_union(const typename Order::Type (&x)[n],
                                                                const typename Order::Type (&y)[n]) {
  static_assert(rank >= 1 && rank <= n);
  typename Order::Type r = Order::first(x[rank - 1], y[rank - 1]);
#pragma unroll
  for (int i = 0; i + 1 < rank; ++i) r = Order::first(r, Order::second(x[i], y[rank - 2 - i]));
  return r;
}
// The same for a rank from low to high, the same in all lanes, by branches: merging the two and choosing among the
// results costs three times as much.
template <class Order, int low, int high, int n>
__device__ __forceinline__ typename Order::Type ranked_of_union(const typename Order::Type (&x)[n],
                                                                const typename Order::Type (&y)[n], int rank) {
  constexpr int middle = (low + high) / 2;
  if constexpr (low == high) {
    return ranked_of_union<Order, low>(x, y);
  } else if (rank <= middle) {
    return ranked_of_union<Order, low, middle>(x, y, rank);
  } else {
    return ranked_of_union<Order, middle + 1, high>(x, y, rank);
  }
}
// The same in the union of this lane's sorted x and that of lane ^ other.
template <class Order, int low, int high, int n>
__device__ __forceinline__ typename Order::Type ranked_of_two_lanes(const typename Order::Type (&x)[n], int other,
                                                                    int rank) {
  typename Order::Type theirs[n];
#pragma unroll
  for (int i = 0; i < high; ++i) theirs[i] = __shfl_xor_sync(kAllLanes, x[i], other);
  return ranked_of_union<Order, low, high>(x, theirs, rank);
}

// Sorts the 2n elements of the lanes of a pair, each sorted by itself: the even lane gets the first half.
template <class Order, int n>
__device__ __forceinline__ void merge_two_lanes(typename Order::Type (&x)[n], bool odd) {
  typename Order::Type theirs[n];
#pragma unroll
  for (int i = 0; i < n; ++i) theirs[i] = __shfl_xor_sync(kAllLanes, x[n - 1 - i], 1);
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = odd ? Order::second(x[i], theirs[i]) : Order::first(x[i], theirs[i]);
  sort_bitonic<Order>(x);
}

}  // namespace moba::cuda
