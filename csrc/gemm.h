// Matrix products in blocks that caches hold, for the ops that have many rows.
#pragma once

#ifdef __AVX512F__

#include <algorithm>
#include <memory>

#include "logits.h"
#include "tile.h"

namespace srlm {

// A block of results is summed in memory that the second-level cache holds, 8 x 32 at a time in
// registers. Both operands are packed for it: strips of sixteen rows of a, or columns of b, whose
// words of one depth lie side by side.
constexpr int64_t kTileRows = 8, kTileColumns = 2 * kLanes;
constexpr int64_t kBlockColumns = 128, kMostBlockRows = 512;
constexpr int64_t kPart = 2 * kSum;   // words of a strip, 16 KB
constexpr int64_t kMostStrips = 256;  // of a, where 64 rows do with them
using Strip = Words[kPart];

// Any matrix of which rows or columns are contiguous, as its rows or columns ("lines") are packed.
template <class T>
struct Lines {
  const T* data;
  int64_t line, step;  // elements from line to line, and along one; one of them is 1
  const T* at(int64_t i, int64_t k) const { return data + i * line + k * step; }
};

// `count` elements and zeros, as words of W: the elements' own type, or float for bf16.
template <class W, class T>
Words load_words(const T* from, int64_t count) {
  count = std::max<int64_t>(count, 0);
  if constexpr (sizeof(W) != sizeof(T)) return (Words)load(from, count);
  Words x{};
  std::memcpy(&x, from, count * sizeof(T));
  return x;
}

// Of lines that are contiguous: whole words of up to sixteen of them, transposed.
template <class W, class T>
void pack_along(Strip& strip, const Lines<T>& from, int64_t first, int64_t lines, int64_t begin,
                int64_t end) {
  constexpr int64_t kStep = kLanes * kPerWord<W>;
  Words* to = strip;
  for (int64_t k = begin; k < end; k += kStep, to += kLanes) {
    Tile tile;
    if (lines == kLanes && end - k >= kStep) {
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = load_words<W>(from.at(first + i, k), kStep);
    } else {
      const int64_t count = std::min(end - k, kStep);
      for (int64_t i = 0; i < kLanes; ++i)
        tile[i] = i < lines ? load_words<W>(from.at(first + i, k), count) : Words{};
    }
    transpose(tile);
    std::copy(tile, tile + kLanes, to);
  }
}

// Of lines that lie side by side.
template <class W, class T>
Words across(const Lines<T>& from, int64_t first, int64_t lines, int64_t k, int64_t end) {
  if constexpr (kPerWord<W> == 1) return load_words<W>(from.at(first, k), lines);
  Halves low{}, high{};
  std::memcpy(&low, from.at(first, k), lines * sizeof(BFloat16));
  if (k + 1 < end) std::memcpy(&high, from.at(first, k + 1), lines * sizeof(BFloat16));
  return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}
template <class W, class T>
void pack_across(Strip& strip, const Lines<T>& from, int64_t first, int64_t lines, int64_t begin,
                 int64_t end) {
  Words* to = strip;
  for (int64_t k = begin; k < end; k += kPerWord<W>)
    *to++ = lines == kLanes ? across<W>(from, first, kLanes, k, end)
                            : across<W>(from, first, lines, k, end);
}

// Lines `first` to `last`, depth `begin` to `end`, which is one part or less.
template <class W, class T>
void pack(Strip* strips, const Lines<T>& from, int64_t first, int64_t last, int64_t begin,
          int64_t end) {
  for (; first < last; first += kLanes, ++strips) {
    const int64_t lines = std::min(last - first, kLanes);
    if (from.step == 1) pack_along<W>(*strips, from, first, lines, begin, end);
    else pack_across<W>(*strips, from, first, lines, begin, end);
  }
}

// Has lines read into the second-level cache, which packing would have to wait for: they are short
// streams from many places, which the hardware does not follow by itself.
template <class T>
void fetch_early(const Lines<T>& from, int64_t first, int64_t last, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (from.step == 1) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t k = begin; k < end; k += kLine) __builtin_prefetch(from.at(i, k), 0, 2);
  } else {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = first; i < last; i += kLine) __builtin_prefetch(from.at(i, k), 0, 2);
  }
}

// to = a b, or to += a b, for eight lines of a strip of a and two strips of b, from words `k` on.
template <class W>
[[gnu::noinline]] void multiply(const uint32_t* a, const Strip* b, int64_t k, int64_t last,
                                bool first, float* to, int64_t stride) {
  Floats sums[kTileRows][2]{};
  for (; k < last; ++k) {
    Words left = b[0][k], right = b[1][k];
    asm("" : "+v"(left), "+v"(right));  // or the compiler reads them again for each row
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Words x = splat(a[k * kLanes + i]);
      sums[i][0] = add_products<W>(sums[i][0], x, left);
      sums[i][1] = add_products<W>(sums[i][1], x, right);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      float* const out = to + i * stride + v * kLanes;
      store(out, first ? sums[i][v] : load(out, kLanes) + sums[i][v], kLanes);
    }
}

template <class T>
struct Product {
  Lines<T> a, b;
  int64_t rows, columns, depth;
};

// What one thread works in: rows of a at their whole depth, which serve block after block, one part
// of columns of b, and the sums of a block.
struct Memory {
  int64_t strips;  // of a part of a
  std::unique_ptr<Strip[]> a, b;
  std::unique_ptr<float[]> sums;
  int64_t row = -1;
  Memory(int64_t block_rows, int64_t parts)
      : strips(block_rows / kLanes),
        a(new Strip[strips * parts]),
        b(new Strip[kBlockColumns / kLanes]),
        sums(new float[block_rows * kBlockColumns]) {}
};

template <class W>
constexpr int64_t kDepth = kPart * kPerWord<W>;  // of a part

template <class W, class T>
void sum_block(const Product<T>& p, int64_t row, int64_t last_row, int64_t column,
               int64_t last_column, Memory& memory) {
  Strip* a = memory.a.get();
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + kDepth<W>, p.depth);
    const int64_t words = (end - begin + kPerWord<W> - 1) / kPerWord<W>;
    if (memory.row != row) pack<W>(a, p.a, row, last_row, begin, end);
    pack<W>(memory.b.get(), p.b, column, last_column, begin, end);
    // What is packed next: the next part of these columns, or the first of the next ones.
    const bool last = end == p.depth;
    const int64_t next = last ? last_column : column, next_begin = last ? 0 : end;
    const int64_t next_end = std::min(next_begin + kDepth<W>, p.depth);
    for (int64_t j = 0; j < last_column - column; j += kTileColumns) {
      fetch_early(p.b, std::min(next + j, p.columns), std::min(next + j + kTileColumns, p.columns),
                  next_begin, next_end);
      for (int64_t i = 0; i < last_row - row; i += kTileRows)
        for (int64_t k = 0; k == 0 || k < words; k += kSum)
          multiply<W>(reinterpret_cast<const uint32_t*>(a[i / kLanes]) + i % kLanes,
                      &memory.b[j / kLanes], k, std::min(k + kSum, words), begin + k == 0,
                      &memory.sums[i * kBlockColumns + j], kBlockColumns);
    }
    a += memory.strips;
  } while ((begin += kDepth<W>) < p.depth);
  memory.row = row;
}

// to = a b + bias, or to += a b. W: what is multiplied, the elements' own type or float.
template <class W, class T, class Out>
void gemm(const Rows<Out>& to, const Product<T>& p, bool add, const float* bias = nullptr) {
  const int64_t across = (p.columns + kBlockColumns - 1) / kBlockColumns;
  // Lower blocks where there are few of them, so that no thread waits for another's last.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t block_rows = kMostBlockRows;
  while (block_rows > 2 * kLanes && p.rows * across < 2 * threads * block_rows) block_rows /= 2;
  const int64_t parts = std::max<int64_t>((p.depth + kDepth<W> - 1) / kDepth<W>, 1);
  while (block_rows > 4 * kLanes && block_rows / kLanes * parts > kMostStrips) block_rows /= 2;
  const int64_t blocks = (p.rows + block_rows - 1) / block_rows * across;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Memory memory(block_rows, parts);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / across * block_rows, column = block % across * kBlockColumns;
      const int64_t last_row = std::min(row + block_rows, p.rows);
      const int64_t last_column = std::min(column + kBlockColumns, p.columns);
      sum_block<W>(p, row, last_row, column, last_column, memory);
      for (int64_t i = row; i < last_row; ++i) {
        const float* const sums = &memory.sums[(i - row) * kBlockColumns];
        Out* const here = to[i] + column;
        each_vector(last_column - column, [&](int64_t j, int64_t count) {
          Floats sum = load(sums + j, count);
          if (bias) sum += load(bias + column + j, count);
          store(here + j, add ? sum + load(here + j, count) : sum, count);
        });
      }
    }
  });
}

}  // namespace srlm

#endif
