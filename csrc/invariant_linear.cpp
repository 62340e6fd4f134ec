// x w^T, fastest for as few rows of x as decoding has: kernels/srlm_kernels/invariant_linear.py.
//
// Every result is one sum over k, from left to right, by the same instructions wherever it is
// computed: its bits depend on its row of x and its row of w, and on nothing else.

#include <algorithm>
#include <memory>
#include <new>

#include "logits.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace srlm {
namespace {

// Rows go through the products as words of four bytes: one float, or two of bf16 side by side.
template <class T>
constexpr int64_t kPerWord = int64_t(sizeof(uint32_t) / sizeof(T));

// A block of sixteen words of sixteen rows.
using Tile = Words[kLanes];
using Pairs = uint64_t __attribute__((vector_size(4 * kLanes)));

// Sums that are kept in registers at once.
#ifdef __AVX512F__
constexpr int64_t kSums = 16;
#else
constexpr int64_t kSums = 4;
#endif

inline Words splat(uint32_t x) { return Words{} + x; }

// sum + a * b, of both halves of a word for bf16.
template <class T>
Floats add_products(Floats sum, Words a, Words b) {
  if constexpr (kPerWord<T> == 1) {
    return sum + (Floats)a * (Floats)b;
  } else {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & 0xffff0000) * (Floats)(b & 0xffff0000);
#endif
  }
}

// Within each 128 bits: single lanes, then pairs of lanes, of a and b in turn. Then every other
// 128 bits.
Words low(Words a, Words b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
Words high(Words a, Words b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
Words low_pairs(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 0, 8, 2, 10, 4, 12, 6, 14);
}
Words high_pairs(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 1, 9, 3, 11, 5, 13, 7, 15);
}
Words even_quads(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 0, 1, 4, 5, 8, 9, 12, 13);
}
Words odd_quads(Words a, Words b) {
  return (Words)__builtin_shufflevector((Pairs)a, (Pairs)b, 2, 3, 6, 7, 10, 11, 14, 15);
}

[[gnu::always_inline]] inline void transpose(Tile& x) {
  Tile y;
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // columns of four rows, within 128 bits
    const Words a = low(x[i], x[i + 1]), b = low(x[i + 2], x[i + 3]);
    const Words c = high(x[i], x[i + 1]), d = high(x[i + 2], x[i + 3]);
    y[i] = low_pairs(a, b);
    y[i + 1] = high_pairs(a, b);
    y[i + 2] = low_pairs(c, d);
    y[i + 3] = high_pairs(c, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // the 4 by 4 of 128 bits
    const Words a = even_quads(y[i], y[i + 4]), b = even_quads(y[i + 8], y[i + 12]);
    const Words c = odd_quads(y[i], y[i + 4]), d = odd_quads(y[i + 8], y[i + 12]);
    x[i] = even_quads(a, b);
    x[i + 8] = odd_quads(a, b);
    x[i + 4] = even_quads(c, d);
    x[i + 12] = odd_quads(c, d);
  }
}

// Sixteen rows of a matrix from `row` on, the last one over again where the matrix has ended.
template <class T>
struct Block {
  const T* from[kLanes];
  int64_t whole;  // words in whole tiles
  Tile last;      // what is left of the rows, and zeros

  Block(const Rows<const T>& matrix, int64_t row, int64_t rows, int64_t columns)
      : whole(columns / (kLanes * kPerWord<T>)*kLanes) {
    const int64_t done = whole * kPerWord<T>;
    for (int64_t i = 0; i < kLanes; ++i) from[i] = matrix[std::min(row + i, rows - 1)];
    if (done == columns) return;
    for (int64_t i = 0; i < kLanes; ++i) {
      last[i] = Words{};
      std::memcpy(&last[i], from[i] + done, (columns - done) * sizeof(T));
    }
  }

  // Words `k` to `k` + 15 of kRows rows from row `first` on.
  template <int64_t kRows>
  [[gnu::always_inline]] void read(Words* tile, int64_t first, int64_t k) const {
    if (k >= whole) {
      std::copy(last + first, last + first + kRows, tile);
      return;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i)
      std::memcpy(&tile[i], from[first + i] + k * kPerWord<T>, sizeof(Words));
  }
};

// A group of rows of w, and the sums of up to 32 rows of x with it.
constexpr int64_t kGroup = 2;
template <class T>
using Group = Block<T>[kGroup];
using Sums = Tile[kGroup][2];

// For up to eight rows of x. Lanes are rows of w: two blocks of them, since the sums of one would
// wait for each other. `x` holds kRows rows of `words` words.
template <class T, int64_t kRows>
[[gnu::noinline]] void few_rows(const Group<T>& w, const uint32_t* x, int64_t words, Sums& out) {
  constexpr int64_t kAtOnce = kRows < 8 ? kGroup : 1;
  for (int64_t first = 0; first < kGroup; first += kAtOnce) {
    Floats sums[kAtOnce][kRows]{};
    for (int64_t k = 0; k < words; k += kLanes) {
#pragma GCC unroll 2
      for (int64_t b = 0; b < kAtOnce; ++b) {
        Tile tile;
        w[first + b].template read<kLanes>(tile, 0, k);
        transpose(tile);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j)
#pragma GCC unroll 8
          for (int64_t m = 0; m < kRows; ++m)
            sums[b][m] = add_products<T>(sums[b][m], splat(x[m * words + k + j]), tile[j]);
      }
    }
    for (int64_t b = 0; b < kAtOnce; ++b)
      for (int64_t m = 0; m < kRows; ++m) out[first + b][0][m] = (Words)sums[b][m];
  }
}

// Lanes are rows of x, 16 kVectors of them, transposed: words of a column lie side by side.
template <class T, int64_t kVectors>
[[gnu::noinline]] void many_rows(const Block<T>& w, const Words* x, int64_t words,
                                 Tile (&out)[2]) {
  constexpr int64_t kRows = kSums / kVectors;  // of w
  for (int64_t first = 0; first < kLanes; first += kRows) {
    Floats sums[kRows][kVectors]{};
    for (int64_t k = 0; k < words; k += kLanes) {
      Words tile[kRows];
      w.template read<kRows>(tile, first, k);
      for (int64_t j = 0; j < kLanes; ++j)
#pragma GCC unroll 16
        for (int64_t n = 0; n < kRows; ++n)
#pragma GCC unroll 2
          for (int64_t v = 0; v < kVectors; ++v)
            sums[n][v] = add_products<T>(sums[n][v], x[(k + j) * kVectors + v],
                                         splat(uint32_t(tile[n][j])));
    }
    for (int64_t n = 0; n < kRows; ++n)
      for (int64_t v = 0; v < kVectors; ++v) out[v][first + n] = (Words)sums[n][v];
  }
  for (int64_t v = 0; v < kVectors; ++v) transpose(out[v]);
}

// The rows of x in strips, each padded with zeros to whole tiles and laid out for its products.
template <class T>
struct Packed {
  int64_t rows, words;
  std::unique_ptr<Words[]> data;

  explicit Packed(const Tensor& x)
      : rows(x.size(0)),
        words((x.size(1) + kLanes * kPerWord<T> - 1) / (kLanes * kPerWord<T>)*kLanes),
        data(new Words[(rows + 31) / 32 * 2 * words]) {
    const auto from = rows_of<const T>(x);
    for (int64_t row = 0; row < rows; row += strip(row)) {
      const int64_t vectors = strip(row) / kLanes;
      Words* const to = data.get() + row / kLanes * words;
      for (int64_t v = 0; v < std::max<int64_t>(vectors, 1); ++v) {
        const Block<T> block(from, row + v * kLanes, rows, x.size(1));
        for (int64_t k = 0; k < words; k += kLanes) {
          Tile tile;
          block.template read<kLanes>(tile, 0, k);
          if (vectors > 0) transpose(tile);
          for (int64_t i = 0; i < kLanes; ++i)
            to[vectors > 0 ? (k + i) * vectors + v : (i * words + k) / kLanes] = tile[i];
        }
      }
    }
  }

  // How many rows go together from `row` on.
  int64_t strip(int64_t row) const {
    const int64_t left = rows - row;
    return left > 24 ? 32 : left > 8 ? 16 : 8;
  }

  void multiply(const Group<T>& w, int64_t row, Sums& sums) const {
    const Words* const x = data.get() + row / kLanes * words;
    const auto* const flat = reinterpret_cast<const uint32_t*>(x);
    const int64_t left = rows - row;
    if (left > 8) {
      for (int64_t b = 0; b < kGroup; ++b)
        if (strip(row) == 32) many_rows<T, 2>(w[b], x, words, sums[b]);
        else many_rows<T, 1>(w[b], x, words, sums[b]);
    } else if (left > 4) {
      few_rows<T, 8>(w, flat, words, sums);
    } else if (left > 2) {
      few_rows<T, 4>(w, flat, words, sums);
    } else if (left > 1) {
      few_rows<T, 2>(w, flat, words, sums);
    } else {
      few_rows<T, 1>(w, flat, words, sums);
    }
  }
};

template <class T, class Out>
void multiply(const Tensor& out, const Tensor& x, const Tensor& weight, const float* bias) {
  constexpr int64_t kWidth = kGroup * kLanes;
  const int64_t rows = x.size(0), columns = weight.size(0), depth = x.size(1);
  const Packed<T> packed(x);
  const auto to = rows_of<Out>(out);
  const auto w = rows_of<const T>(weight);
  const int64_t grain = 1 + (1 << 18) / (kWidth * (rows + 4) * depth + 1);
  const auto column_group = [&](int64_t first) {
    const Group<T> group{{w, first, columns, depth}, {w, first + kLanes, columns, depth}};
    for (int64_t row = 0; row < rows; row += packed.strip(row)) {
      Sums sums;
      packed.multiply(group, row, sums);
      for (int64_t b = 0; b < kGroup; ++b) {
        const int64_t n = first + b * kLanes, count = std::min(kLanes, columns - n);
        if (count <= 0) break;
        const Floats shift = bias ? load(bias + n, count) : Floats{};
        for (int64_t m = 0; m < std::min(packed.strip(row), rows - row); ++m)
          store(to[row + m] + n, (Floats)sums[b][m / kLanes][m % kLanes] + shift, count);
      }
    }
  };
  torch::stable::parallel_for(0, (columns + kWidth - 1) / kWidth, grain,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) column_group(i * kWidth);
                              });
}

void invariant_linear(const Tensor& out, const Tensor& x, const Tensor& weight,
                     const std::optional<Tensor>& bias) {
  const ScalarType dtype = x.scalar_type();
  const bool wide = out.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "x must be fp32 or bf16");
  STD_TORCH_CHECK(wide || out.scalar_type() == ScalarType::BFloat16, "out must be fp32 or bf16");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1) &&
                      weight.scalar_type() == dtype,
                  "x must be [M, K], and weight [N, K] of the same dtype");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == x.size(0) && out.size(1) == weight.size(0),
                  "out must be [M, N]");
  for (const Tensor* matrix : {&out, &x, &weight})
    STD_TORCH_CHECK(matrix->size(1) < 2 || matrix->stride(1) == 1,
                    "x, weight and out must have unit column stride");
  const float* shift = bias_of(bias, weight.size(0));
  if (dtype == ScalarType::Float) {
    (wide ? &multiply<float, float> : &multiply<float, BFloat16>)(out, x, weight, shift);
  } else {
    (wide ? &multiply<BFloat16, float> : &multiply<BFloat16, BFloat16>)(out, x, weight, shift);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def("invariant_linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("invariant_linear", TORCH_BOX(&invariant_linear));
}

}  // namespace srlm
