// The lowest gap that top_k, top_p and min_p keep, found exactly and without sorting.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "simd.h"

namespace srlm {

using Bytes = uint8_t __attribute__((vector_size(kLanes)));

constexpr int64_t kColumns = 256;  // of a block
constexpr float kLowest = std::numeric_limits<float>::lowest();

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
        if (w[lane] == 0) continue;
        last = i + lane;
        below += w[lane];
        if (below > level) return last;
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

// Gaps to search among, padded to whole vectors, with their weights and columns.
struct Entries {
  std::unique_ptr<float[]> gap, weight;
  std::unique_ptr<int32_t[]> id;
  int64_t count = 0;

  explicit Entries(int64_t capacity)
      : gap(new float[capacity + kLanes]),
        weight(new float[capacity + kLanes]),
        id(new int32_t[capacity + kLanes]) {}

  void close() {
    for (; count % kLanes != 0; ++count) gap[count] = -kInfinity;
    for (int64_t i = 0; i < count; i += kLanes)
      store(&weight[i], exp(load(&gap[i], kLanes)), kLanes);
  }

  double mass_from(float cutoff) const {
    Total total;
    for (int64_t i = 0; i < count; i += kLanes)
      total.add(load(&gap[i], kLanes) >= cutoff ? load(&weight[i], kLanes) : Floats{});
    return total.sum();
  }
};

// The best score; `tops` takes those of each lane of each block.
inline float best_of(const float* x, int64_t columns, Entries& tops) {
  Floats best = splat(-kInfinity);
  for (int64_t first = 0; first < columns; first += kColumns) {
    Floats top = splat(-kInfinity);
    each_vector(std::min(kColumns, columns - first), [&](int64_t i, int64_t n) {
      top = larger(load_or(x + first + i, n, -kInfinity), top);
    });
    store(&tops.gap[first / kColumns * kLanes], top, kLanes);
    best = larger(top, best);
  }
  tops.count = blocks_of(columns) * kLanes;
  return largest(best);
}

// The highest gap from which on there are `needed` entries, or that weight; `low` if there is none
// above it. Bisects between gaps that occur, so that it ends on one.
template <bool kByMass>
float highest_with(const Entries& entries, float low, double needed) {
  float high = 0;
  while (low < high) {
    float pivot = low + (high - low) / 2;
    if (pivot <= low) pivot = high;
    Total above;
    Floats under = splat(-kInfinity), over = under;  // the nearest gaps, the second one negated
    for (int64_t i = 0; i < entries.count; i += kLanes) {
      const Floats gap = load(&entries.gap[i], kLanes);
      const Floats unit = kByMass ? load(&entries.weight[i], kLanes) : splat(1);
      above.add(gap >= pivot ? unit : Floats{});
      under = larger(gap < pivot ? gap : splat(-kInfinity), under);
      over = larger(gap >= pivot ? -gap : splat(-kInfinity), over);
    }
    if (above.sum() >= needed) low = -largest(over);
    else high = largest(under);
  }
  return low;
}

struct Limits {
  int32_t top_k;      // 0 or less: off
  float top_p, min_p;  // 1 and 0: off

  // `some` takes the columns that may be kept, from left to right; `total` is the row's weight.
  float cutoff(const float* x, int64_t columns, Gap gap, double total, Entries& tops,
               Entries& some) const {
    gather(x, columns, gap, lower_bound(gap, total, tops), tops, some);
    float cutoff = kLowest;
    if (top_k > 0) cutoff = highest_with<false>(some, cutoff, top_k);
    if (top_p < 1) {
      const double needed = top_p * (top_k > 0 ? some.mass_from(cutoff) : total);
      cutoff = highest_with<true>(some, cutoff, needed);
    }
    return std::max(cutoff, least());
  }

 private:
  float least() const { return min_p > 0 ? float(std::log(double(min_p))) : kLowest; }

  // Of the lanes' best entries alone: among all there are at least as many, and as much weight.
  float lower_bound(Gap gap, double total, Entries& tops) const {
    for (int64_t i = 0; i < tops.count; i += kLanes)
      store(&tops.gap[i], gap(load(&tops.gap[i], kLanes)), kLanes);
    tops.close();
    if (top_k > 0) return highest_with<false>(tops, kLowest, top_k);
    return top_p < 1 ? highest_with<true>(tops, kLowest, top_p * total) : least();
  }

  static void gather(const float* x, int64_t columns, Gap gap, float bound, const Entries& tops,
                     Entries& some) {
    some.count = 0;
    for (int64_t first = 0; first < columns; first += kColumns) {
      const float* const top = &tops.gap[first / kColumns * kLanes];
      if (largest(load(top, kLanes)) < bound) continue;
      const int64_t end = std::min(first + kColumns, columns);
      for (int64_t i = first; i < end; ++i) {
        some.gap[some.count] = gap(x[i]);
        some.id[some.count] = i;
        some.count += some.gap[some.count] >= bound;
      }
    }
    some.close();
  }
};

}  // namespace srlm
