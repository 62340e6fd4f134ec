// Products of a few rows with a narrow matrix whose sums stay in registers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace srlm {

// As wide as a register: wider ones would live in memory. A block of sums takes half of the
// registers, 16 of the 32 of AVX-512, or 8 of 16.
#if defined(__AVX512F__)
constexpr int kRegister = 16, kBlockVectors = 4;
#elif defined(__AVX__)
constexpr int kRegister = 8, kBlockVectors = 2;
#else
constexpr int kRegister = 4, kBlockVectors = 2;
#endif
constexpr int kBlockRows = 4;

using Register = float __attribute__((vector_size(4 * kRegister)));

inline Register load_register(const float* from) {
  Register x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Register load_register(const BFloat16* from) {
  uint16_t __attribute__((vector_size(2 * kRegister))) x;
  std::memcpy(&x, from, sizeof(x));
  using Bits = uint32_t __attribute__((vector_size(4 * kRegister)));
  return (Register)(__builtin_convertvector(x, Bits) << 16);
}

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

// A matrix whose rows are the columns of one in memory.
struct Transposed {
  const float* data;
  int64_t stride;  // of the one in memory
  struct Row {
    const float* data;
    int64_t stride;
    float operator[](int64_t column) const { return data[column * stride]; }
  };
  Row operator[](int64_t row) const { return {data + row, stride}; }
};

// c = a b; or the sums go on from c, as parts of one long sum; or they are added to c when whole.
enum class Into { kNew, kOngoing, kTotal };

template <int kRows, int kVectors, Into kInto, class T, class A>
[[gnu::noinline]] void block_product(A a, Matrix<const T> b, int64_t depth, Matrix<float> c) {
  Register sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = kInto == Into::kOngoing ? load_register(c[r] + v * kRegister) : Register{};
  for (int64_t k = 0; k < depth; ++k) {
    Register row[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      row[v] = load_register(b[k] + v * kRegister);
#ifdef __AVX512F__
      // Or the compiler reads it again for each of the rows, more than the loads keep up with.
      if constexpr (kRows > 1) asm("" : "+v"(row[v]));
#endif
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r][k] * row[v];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kInto == Into::kTotal) sums[r][v] += load_register(c[r] + v * kRegister);
      std::memcpy(c[r] + v * kRegister, &sums[r][v], sizeof(Register));
    }
}

// c = a b, or c += a b, for up to kBlockRows rows of a [rows, depth], and b [depth, columns] with
// columns a multiple of kLanes.
//
// Sums are folded in the order of depth, one at a time, whatever is computed beside them.
template <Into kInto, class T, class A = Matrix<const float>>
void product(A a, Matrix<const T> b, int64_t depth, Matrix<float> c, int64_t rows,
             int64_t columns) {
  constexpr int64_t kColumns = kBlockVectors * kRegister;
  as_constant<kBlockRows>(rows, [&](auto block_rows) {
    for (int64_t i = 0; i < columns; i += kColumns)
      as_constant<kBlockVectors>(std::min(columns - i, kColumns) / kRegister, [&](auto vectors) {
        block_product<block_rows, vectors, kInto, T, A>(a, {b[0] + i, b.stride}, depth,
                                                       {c[0] + i, c.stride});
      });
  });
}

}  // namespace srlm
