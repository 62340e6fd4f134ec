// x w^T, fastest for as few rows of x as decoding has: kernels/srlm_kernels/invariant_linear.py.
//
// Every result is one sum over k in one order, by the same instructions wherever it is computed:
// its bits depend on its row of x and its row of w, and on nothing else.
//
// With AVX-512 only: with narrower registers libraries are as fast, and this would be far slower.
#ifdef __AVX512F__

#include "gemm.h"

namespace srlm {
namespace {

// Sixteen rows of a matrix from `row` on; the last one over again where the matrix has ended.
template <class T>
struct Block {
  const T* from[kLanes];
  int64_t whole;  // words in whole tiles
  int64_t ahead;  // elements from a tile to the one that is fetched early
  Tile last;      // what is left of the rows, and zeros

  Block(const Rows<const T>& matrix, int64_t row, int64_t rows, int64_t columns, int64_t ahead = 0)
      : whole(columns / (kLanes * kPerWord<T>)*kLanes), ahead(ahead) {
    const int64_t done = whole * kPerWord<T>;
    for (int64_t i = 0; i < kLanes; ++i) from[i] = matrix[std::min(row + i, rows - 1)];
    if (done == columns) return;
    for (int64_t i = 0; i < kLanes; ++i) {
      last[i] = Words{};
      std::memcpy(&last[i], from[i] + done, (columns - done) * sizeof(T));
    }
  }

  // Words `k` to `k` + 15 of kRows rows, from row `first` on.
  template <int64_t kRows>
  [[gnu::always_inline]] void read(Words* tile, int64_t first, int64_t k) const {
    if (k >= whole) {
      std::copy(last + first, last + first + kRows, tile);
      return;
    }
    const T* const* const row = from + first;
    const int64_t column = k * kPerWord<T>;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i) std::memcpy(&tile[i], row[i] + column, sizeof(Words));
    for (int64_t i = 0; i < kRows; ++i) __builtin_prefetch(row[i] + column + ahead);
  }
};

// From as many rows of x on blocks that fit caches are faster, and their sums the same.
constexpr int64_t kManyRows = 96;

// Two blocks of rows of w, and their products with up to 32 rows of x.
constexpr int64_t kBlocks = 2;
template <class T>
using Group = Block<T>[kBlocks];
using Sums = Tile[kBlocks][2];

inline void add(Words& out, Floats sum, int64_t part) {
  out = (Words)(part == 0 ? sum : (Floats)out + sum);
}

// For up to eight rows of x. Lanes are rows of w. `x` holds kRows rows of `words` words.
template <class T, int64_t kRows>
[[gnu::noinline]] void few_rows(const Group<T>& w, const uint32_t* x, int64_t words, Sums& out) {
  // The sums of a single block would wait for each other.
  constexpr int64_t kAtOnce = kRows < 4 ? kBlocks : 1;
  int64_t part = 0;
  do {
    for (int64_t first = 0; first < kBlocks; first += kAtOnce) {
      Floats sums[kAtOnce][kRows]{};
      for (int64_t k = part; k < std::min(part + kSum, words); k += kLanes)
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
      for (int64_t b = 0; b < kAtOnce; ++b)
        for (int64_t m = 0; m < kRows; ++m) add(out[first + b][0][m], sums[b][m], part);
    }
  } while ((part += kSum) < words);
}

// Lanes are rows of x: kVectors times sixteen, transposed, so that a column's words lie together.
template <class T, int64_t kVectors>
[[gnu::noinline]] void many_rows(const Block<T>& w, const Words* x, int64_t words, Tile* out) {
  constexpr int64_t kRows = kLanes / kVectors;  // of w at once: sixteen sums stay in registers
  int64_t part = 0;
  do {
    for (int64_t first = 0; first < kLanes; first += kRows) {
      Floats sums[kRows][kVectors]{};
      for (int64_t k = part; k < std::min(part + kSum, words); k += kLanes) {
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
        for (int64_t v = 0; v < kVectors; ++v) add(out[v][first + n], sums[n][v], part);
    }
  } while ((part += kSum) < words);
  for (int64_t v = 0; v < kVectors; ++v) transpose(out[v]);
}

// The rows of x in strips, padded with zeros to whole tiles and laid out as their products want.
template <class T>
struct Strips {
  int64_t rows, words;
  std::unique_ptr<Words[]> data;

  Strips(const Rows<const T>& from, int64_t rows, int64_t columns)
      : rows(rows),
        words((columns + kLanes * kPerWord<T> - 1) / (kLanes * kPerWord<T>)*kLanes),
        data(new Words[(rows + 31) / 32 * 2 * words]) {
    for (int64_t row = 0; row < rows; row += size(row)) {
      const int64_t vectors = size(row) / kLanes;  // 0: not transposed
      for (int64_t v = 0; v < std::max<int64_t>(vectors, 1); ++v) {
        const Block<T> block(from, row + v * kLanes, rows, columns);
        for (int64_t k = 0; k < words; k += kLanes) {
          Tile tile;
          block.template read<kLanes>(tile, 0, k);
          if (vectors > 0) transpose(tile);
          for (int64_t i = 0; i < kLanes; ++i)
            (*this)[row][vectors > 0 ? (k + i) * vectors + v : (i * words + k) / kLanes] = tile[i];
        }
      }
    }
  }

  // Rows of the strip that begins at `row`.
  int64_t size(int64_t row) const { return rows - row > 24 ? 32 : rows - row > 8 ? 16 : 8; }

  Words* operator[](int64_t row) const { return data.get() + row / kLanes * words; }

  void multiply(const Group<T>& w, int64_t row, Sums& sums) const {
    const Words* const x = (*this)[row];
    const auto* const flat = reinterpret_cast<const uint32_t*>(x);
    const int64_t left = rows - row;
    if (left > 8) {
      for (int64_t b = 0; b < kBlocks; ++b)
        if (size(row) == 32) many_rows<T, 2>(w[b], x, words, sums[b]);
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

// [..., C] as a matrix.
template <class T>
Rows<T> flat_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return {static_cast<T*>(x.data_ptr()), last == 1 ? x.stride(0) : x.size(last)};
}

template <class T, class Out>
void multiply(const Tensor& out, const Tensor& x, const Tensor& weight, const float* bias,
              int64_t rows) {
  constexpr int64_t kWidth = kBlocks * kLanes;
  const int64_t columns = weight.size(0), depth = weight.size(1);
  const auto from = flat_rows<const T>(x);
  const auto to = flat_rows<Out>(out);
  const auto w = rows_of<const T>(weight);
  if (rows >= kManyRows) {
    const Lines<T> a{from.data, from.stride, 1}, b{w.data, w.stride, 1};
    return gemm<T>(to, Product<T>{a, b, rows, columns, depth}, false, bias);
  }
  const Strips<T> strips(from, rows, depth);
  // A tile is read from sixteen streams of memory, more than the hardware follows by itself: the
  // next group's words are fetched early, or, where rows are long, those some tiles further on.
  const bool long_rows = depth * sizeof(T) > 4096;
  const int64_t ahead = long_rows ? 256 / int64_t(sizeof(T)) : kWidth * w.stride;
  const auto run = [&](int64_t n) {
    const Group<T> group{{w, n, columns, depth, ahead}, {w, n + kLanes, columns, depth, ahead}};
    for (int64_t row = 0; row < rows; row += strips.size(row)) {
      Sums sums;
      strips.multiply(group, row, sums);
      for (int64_t b = 0; b < kBlocks && n + b * kLanes < columns; ++b)
        each_vector(std::min(kLanes, columns - n - b * kLanes), [&](int64_t, int64_t count) {
          const int64_t first = n + b * kLanes;
          const Floats shift = bias ? load(bias + first, count) : Floats{};
          for (int64_t m = 0; m < std::min(strips.size(row), rows - row); ++m)
            store(to[row + m] + first, (Floats)sums[b][m / kLanes][m % kLanes] + shift, count);
        });
    }
  };
  const int64_t grain = 1 + (1 << 18) / (kWidth * (rows + 4) * depth + 1);
  torch::stable::parallel_for(0, (columns + kWidth - 1) / kWidth, grain,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) run(i * kWidth);
                              });
}

void invariant_linear(const Tensor& out, const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias) {
  const ScalarType dtype = x.scalar_type();
  const bool narrow = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "x must be fp32 or bf16");
  STD_TORCH_CHECK(narrow || out.scalar_type() == ScalarType::Float, "out must be fp32 or bf16");
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && weight.dim() == 2 && weight.size(1) == x.size(last) &&
                      weight.scalar_type() == dtype,
                  "x must be [..., K], and weight [N, K] of the same dtype");
  bool fits = out.dim() == x.dim() && out.size(last) == weight.size(0);
  int64_t rows = 1;
  for (int64_t i = 0; i < last && fits; ++i) {
    fits = out.size(i) == x.size(i);
    rows *= x.size(i);
  }
  STD_TORCH_CHECK(fits, "out must be [..., N]");
  for (const Tensor* matrix : {&out, &x, &weight})
    STD_TORCH_CHECK(matrix->is_contiguous() || (matrix->dim() == 2 && matrix->stride(1) == 1),
                    "x, weight and out must be contiguous, or matrices of unit column stride");
  const float* const shift = bias_of(bias, weight.size(0));
  const auto run = dtype == ScalarType::Float
                       ? (narrow ? &multiply<float, BFloat16> : &multiply<float, float>)
                       : (narrow ? &multiply<BFloat16, BFloat16> : &multiply<BFloat16, float>);
  run(out, x, weight, shift, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def("invariant_linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("invariant_linear", TORCH_BOX(&invariant_linear));
}

}  // namespace srlm

#endif
