// The CDF of a row of scores, in blocks of columns.
#pragma once

#include <algorithm>

#include "simd.h"

namespace srlm {

constexpr int64_t kColumns = 256;  // of a block

inline int64_t blocks_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// A sum of floats in fp64, lane by lane. Two vectors: compilers keep a longer one in memory.
class Total {
 public:
  void add(Floats x) {
    const Wide wide = __builtin_convertvector(x, Wide);
    Doubles half[2];
    std::memcpy(half, &wide, sizeof(wide));
    low_ += half[0];
    high_ += half[1];
  }

  double sum() const {
    const Doubles lanes = low_ + high_;
    double total = 0;
    for (int64_t i = 0; i < kLanes / 2; ++i) total += lanes[i];
    return total;
  }

 private:
  using Wide = double __attribute__((vector_size(8 * kLanes)));
  using Doubles = double __attribute__((vector_size(4 * kLanes)));
  Doubles low_{}, high_{};
};

// Lanes from `count` on hold `otherwise`.
template <class T>
Floats load_or(const T* from, int64_t count, float otherwise) {
  const Floats x = load(from, count);
  return count < kLanes ? (kLane < int32_t(count) ? x : splat(otherwise)) : x;
}

struct Gap {
  float best = 0, sharpness = 1;

  template <class X>
  X operator()(X x) const {
    return (x - best) * sharpness;
  }
};

// The weights e^gap of entries that a cutoff keeps, summed in blocks.
class Cdf {
 public:
  double mass = 0;

  // `blocks` has room for blocks_of(count) numbers.
  Cdf(const float* x, int64_t count, Gap gap, float cutoff, double* blocks)
      : x_(x), count_(count), gap_(gap), cutoff_(cutoff), blocks_(blocks) {
    for (int64_t first = 0; first < count; first += kColumns) {
      Total total;
      each_vector(std::min(kColumns, count - first),
                  [&](int64_t i, int64_t n) { total.add(weights(first + i, n)); });
      blocks[first / kColumns] = total.sum();
      mass += blocks[first / kColumns];
    }
  }

  // The first entry whose CDF is above `level` < mass, never one of weight 0.
  int64_t at(double level) const {
    int64_t first = 0, last = 0;
    double below = 0;
    while (first + kColumns < count_ && below + blocks_[first / kColumns] <= level) {
      below += blocks_[first / kColumns];
      first += kColumns;
    }
    const int64_t end = std::min(first + kColumns, count_);
    for (int64_t i = first; i < end; i += kLanes) {
      const int64_t n = std::min(kLanes, end - i);
      const Floats w = weights(i, n);
      for (int64_t lane = 0; lane < n; ++lane) {
        below += w[lane];
        if (below > level) return i + lane;
        if (w[lane] > 0) last = i + lane;
      }
    }
    return last;  // the block's own sum, in another order, was above the level by rounding alone
  }

 private:
  Floats weights(int64_t i, int64_t n) const {
    const Floats gap = gap_(load_or(x_ + i, n, -kInfinity));
    return gap < cutoff_ ? Floats{} : exp(gap);  // NaN stays NaN
  }

  const float* x_;
  int64_t count_;
  Gap gap_;
  float cutoff_;
  double* blocks_;
};

}  // namespace srlm
