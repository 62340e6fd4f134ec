// Products of a few rows with a narrow matrix whose sums stay in registers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace srlm {

// As many sums as leave registers for a row of the matrix: 16 of the 32 of AVX-512.
#ifdef __AVX512F__
constexpr int kBlockRows = 4, kBlockVectors = 4;
#else
constexpr int kBlockRows = 2, kBlockVectors = 2;
#endif

// f(constant) for the constant equal to n, 1 <= n <= kMost.
template <int kMost, class F>
void as_constant(int64_t n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return as_constant<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Rows of a matrix; T may be narrower than the floats it is multiplied as.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <int kRows, int kVectors, bool kAdd, class T>
[[gnu::noinline]] void block_product(Matrix<const float> a, Matrix<const T> b, int64_t depth,
                                     Matrix<float> c) {
  Floats sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = kAdd ? load(c[r] + v * kLanes, kLanes) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b[k] + v * kLanes, kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r][k] * row[v];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(c[r] + v * kLanes, sums[r][v], kLanes);
}

// c = a b, or c += a b, for up to kBlockRows rows of a [rows, depth] and b [depth, 16 vectors].
//
// Sums are folded in the order of depth, one at a time, whatever is computed beside them.
template <bool kAdd, class T>
void product(Matrix<const float> a, Matrix<const T> b, int64_t depth, Matrix<float> c,
             int64_t rows, int64_t vectors) {
  for (int64_t v = 0; v < vectors; v += kBlockVectors)
    as_constant<kBlockRows>(rows, [&](auto block_rows) {
      as_constant<kBlockVectors>(std::min<int64_t>(vectors - v, kBlockVectors), [&](auto width) {
        block_product<block_rows, width, kAdd, T>(a, {b[0] + v * kLanes, b.stride}, depth,
                                                  {c[0] + v * kLanes, c.stride});
      });
    });
}

}  // namespace srlm
