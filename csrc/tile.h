// Tiles of sixteen by sixteen words, and the arithmetic of products with AVX-512.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace srlm {

// Rows go through the products as words of four bytes: a float, or two of bf16 side by side.
template <class T>
constexpr int64_t kPerWord = sizeof(uint32_t) / sizeof(T);

// Sixteen words of sixteen rows.
using Tile = Words[kLanes];
using Pairs = uint64_t __attribute__((vector_size(4 * kLanes)));

// Sums run over as many words from left to right, and are then added up, which rounds less than one
// long sum. Every product keeps to this order, so that equal operands have equal results in all.
constexpr int64_t kSum = 128;

inline Words splat(uint32_t x) { return Words{} + x; }

// sum + a * b, of both halves of a word for bf16.
template <class T>
Floats add_products(Floats sum, Words a, Words b) {
  if constexpr (kPerWord<T> == 1) return sum + (Floats)a * (Floats)b;
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Floats)(a << 16) * (Floats)(b << 16);
  return sum + (Floats)(a & 0xffff0000) * (Floats)(b & 0xffff0000);
#endif
}

// Of each 128 bits of a and b in turn: the low or high lanes, the low or high pairs of lanes.
inline Words low(Words a, Words b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
inline Words high(Words a, Words b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
inline Words low_pairs(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 0, 8, 2, 10, 4, 12, 6, 14);
}
inline Words high_pairs(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 1, 9, 3, 11, 5, 13, 7, 15);
}
// Every other 128 bits of a, then of b.
inline Words even(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 0, 1, 4, 5, 8, 9, 12, 13);
}
inline Words odd(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 2, 3, 6, 7, 10, 11, 14, 15);
}

[[gnu::always_inline]] inline void transpose(Tile& x) {
  Tile y;
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // four rows, within 128 bits
    const Words a = low(x[i], x[i + 1]), b = low(x[i + 2], x[i + 3]);
    const Words c = high(x[i], x[i + 1]), d = high(x[i + 2], x[i + 3]);
    y[i] = low_pairs(a, b);
    y[i + 1] = high_pairs(a, b);
    y[i + 2] = low_pairs(c, d);
    y[i + 3] = high_pairs(c, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // four by four, of 128 bits each
    const Words a = even(y[i], y[i + 4]), b = even(y[i + 8], y[i + 12]);
    const Words c = odd(y[i], y[i + 4]), d = odd(y[i + 8], y[i + 12]);
    x[i] = even(a, b);
    x[i + 4] = even(c, d);
    x[i + 8] = odd(a, b);
    x[i + 12] = odd(c, d);
  }
}

}  // namespace srlm
