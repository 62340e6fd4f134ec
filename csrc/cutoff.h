// The lowest gap that top_k, top_p and min_p keep, found exactly and without sorting.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "cdf.h"

namespace srlm {

constexpr float kLowest = std::numeric_limits<float>::lowest();

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
