// Sixteen floats at a time, in the vector types of GCC and clang.
//
// Sixteen whatever the machine: where registers are narrower the compiler splits them, so that sums
// keep their order.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace srlm {

constexpr int64_t kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct BFloat16 {
  uint16_t bits;
};

inline Floats splat(float x) { return Floats{} + x; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where a is NaN

inline int64_t vectors_of(int64_t width) { return (width + kLanes - 1) / kLanes; }

// Calls f(column, count) for vector after vector of a row; count is the constant kLanes in all but
// the last, so that only there lanes are counted.
template <class F>
void each_vector(int64_t columns, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) f(i, kLanes);
  if (i < columns) f(i, columns - i);
}

// Memory may be of any type: it is copied, never cast. Lanes from `count` on hold 0.
inline Floats load(const float* from, int64_t count) {
  Floats x{};
  std::memcpy(&x, from, count * sizeof(*from));
  return x;
}

inline Floats load(const BFloat16* from, int64_t count) {
  Halves x{};
  std::memcpy(&x, from, count * sizeof(*from));
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* to, Floats x, int64_t count) {
  std::memcpy(to, &x, count * sizeof(*to));
}

// Rounds to nearest even.
inline void store(BFloat16* to, Floats x, int64_t count) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves y = __builtin_convertvector(x != x ? Words{} + 0x7fc0 : rounded, Halves);
  std::memcpy(to, &y, count * sizeof(*to));
}

// Lane i is lane i ^ kBit of x.
template <int kBit>
Floats flipped(Floats x) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, 0 ^ kBit, 1 ^ kBit, 2 ^ kBit, 3 ^ kBit, 4 ^ kBit, 5 ^ kBit,
                                 6 ^ kBit, 7 ^ kBit, 8 ^ kBit, 9 ^ kBit, 10 ^ kBit, 11 ^ kBit,
                                 12 ^ kBit, 13 ^ kBit, 14 ^ kBit, 15 ^ kBit);
#else
  return __builtin_shuffle(x, kLane ^ kBit);
#endif
}

inline float sum(Floats x) {
  x += flipped<8>(x);
  x += flipped<4>(x);
  x += flipped<2>(x);
  x += flipped<1>(x);
  return x[0];
}

inline float largest(Floats x) {
  x = larger(x, flipped<8>(x));
  x = larger(x, flipped<4>(x));
  x = larger(x, flipped<2>(x));
  x = larger(x, flipped<1>(x));
  return x[0];
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, and a minimax polynomial for e^r: within 1 ulp, or 1.2 where
// multiply-add is not fused. 0 below -87.7, where results would be denormal and slow; infinity
// above 88.3; NaN for NaN.
inline Floats exp(Floats x) {
  // Adding 1.5 * 2^23 rounds to an integer; 127 more leaves the exponent of 2^n in the low bits.
  constexpr float kRound = 12582912.0f + 127.0f;
  x = x < -88.0f ? splat(-88.0f) : x;  // n = -127, whose power of two is the bits of 0
  x = x > 89.0f ? splat(89.0f) : x;    // n = 128: infinity
  const Floats t = x * 1.44269504f + kRound;
  const Floats n = t - kRound;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = splat(1.38145406e-3f);
  p = p * r + 8.36874545e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Floats)((Words)t << 23);
}

inline Floats tanh(Floats x) {
  const Floats far = 1.0f - 2.0f / (exp(x + x) + 1.0f);
  const Floats u = x * x;
  Floats p = splat(-5.70498686e-3f);
  p = p * u + 2.06390880e-2f;
  p = p * u - 5.37397154e-2f;
  p = p * u + 1.33314416e-1f;
  p = p * u - 3.33332807e-1f;
  return u < 0.390625f ? x + x * (u * p) : far;  // |x| < 0.625, where `far` loses digits
}

}  // namespace srlm
