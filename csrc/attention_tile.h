// Attention of the rows of one tile, queries that read the same pages: an online softmax each.
//
// What a row becomes depends on its query, its pages and their order alone, bit for bit: each of its
// sums has one order, and keys that only its mates see are never multiplied into it.
#pragma once

#include <algorithm>
#include <vector>

#include "block_product.h"
#include "tree_plan.h"

namespace srlm {

// The slots of a page that a row sees.
struct Slots {
  int64_t first, end;
  bool empty() const { return first >= end; }
};

inline Slots visible(const PageEntry& entry, int64_t position, int64_t window) {
  const int64_t slot = position - entry.position;
  return {std::max<int64_t>(entry.first, slot - window + 1),
          std::min<int64_t>(entry.end, slot + 1)};
}

inline int64_t vectors_of(int64_t width) { return (width + kLanes - 1) / kLanes; }

// What a softmax needs to go on, or to be merged with that of other pages.
struct Softmax {
  float top = -kInfinity;  // the largest score
  Floats total{};          // sum of e^(score - top), in lanes
};

// One page for one KV head: keys [Dk, 64], values [64, Dv in whole vectors].
template <class T>
struct PageView {
  Matrix<const T> keys, values;
};

class Tile {
 public:
  static constexpr int64_t kRows = 128;

  Tile(int64_t key_width, int64_t value_width, float softcap)
      : key_width_(key_width), value_vectors_(vectors_of(value_width)), softcap_(softcap) {
    // Kept for the next call: fresh memory costs more page faults than a small tile costs time.
    thread_local std::vector<Floats> memory;
    const int64_t key_vectors = vectors_of(key_width), page_vectors = kPage / kLanes;
    const int64_t parts[] = {kRows * key_vectors, kRows * value_vectors_,
                             key_width * page_vectors, kPage * value_vectors_};
    int64_t size = 0;
    for (const int64_t part : parts) size += part;
    if (int64_t(memory.size()) < size) memory.resize(size);
    Floats* next = memory.data();
    const auto take = [&](int part, int64_t stride) {
      const Matrix<float> matrix{reinterpret_cast<float*>(next), stride * kLanes};
      next += parts[part];
      return matrix;
    };
    queries = take(0, key_vectors);
    sums = take(1, value_vectors_);
    keys = take(2, page_vectors);
    values = take(3, value_vectors_);
  }

  // `queries` and `position` of that many rows are set.
  void start(int64_t count) {
    rows = count;
    lowest_ = *std::min_element(position, position + rows);
    highest_ = *std::max_element(position, position + rows);
    std::fill_n(sums[0], count * sums.stride, 0.0f);
    std::fill_n(softmax, count, Softmax{});
  }

  // The slots of a page that some row sees, and perhaps others between them.
  Slots sees(const PageEntry& entry, int64_t window) const {
    return {visible(entry, lowest_, window).first, visible(entry, highest_, window).end};
  }

  // Folds a page into every row that sees some of it.
  template <class T>
  void fold(const PageView<T>& page, const PageEntry& entry, int64_t window) {
    for (int64_t row = 0; row < rows; row += kBlockRows)
      fold_block(row, std::min<int64_t>(kBlockRows, rows - row), page, entry, window);
  }

  int64_t rows;
  int64_t position[kRows];
  Softmax softmax[kRows];
  Matrix<float> queries;  // [rows, Dk], scaled
  Matrix<float> sums;     // [rows, Dv]: sum of e^(score - top) value
  Matrix<float> keys, values;  // room for a page whose layout or dtype is not that of a PageView

 private:
  template <class T>
  void fold_block(int64_t row, int64_t count, const PageView<T>& page, const PageEntry& entry,
                  int64_t window) {
    Slots seen[kBlockRows], any{kPage, 0}, all{0, kPage};
    for (int64_t r = 0; r < count; ++r) {
      seen[r] = visible(entry, position[row + r], window);
      all = {std::max(all.first, seen[r].first), std::min(all.end, seen[r].end)};
      if (seen[r].empty()) continue;
      any = {std::min(any.first, seen[r].first), std::max(any.end, seen[r].end)};
    }
    if (any.empty()) return;
    if (all.empty()) all = {kPage, kPage};

    alignas(64) float weights[kBlockRows][kPage];
    const int64_t from = any.first / kLanes * kLanes;
    product<false, T>({queries[row], queries.stride}, {page.keys[0] + from, page.keys.stride},
                      key_width_, {weights[0] + from, kPage}, count, vectors_of(any.end - from));
    for (int64_t r = 0; r < count; ++r)
      if (!seen[r].empty()) exponentiate(row + r, weights[r], seen[r], from, any.end);

    // Rows see most keys together; those at the ends, which only some see, are added one by one.
    const auto add = [&](int64_t r, int64_t many, int64_t first, int64_t end) {
      if (first < end)
        product<true, T>({weights[r] + first, kPage}, {page.values[first], page.values.stride},
                         end - first, {sums[row + r], sums.stride}, many, value_vectors_);
    };
    for (int64_t r = 0; r < count; ++r)
      add(r, 1, seen[r].first, std::min(seen[r].end, all.first));
    add(0, count, all.first, all.end);
    for (int64_t r = 0; r < count; ++r)
      add(r, 1, std::max(seen[r].first, all.end), seen[r].end);
  }

  // Scores become e^(score - top), 0 for keys that the row does not see, whatever was computed there.
  void exponentiate(int64_t row, float* scores, const Slots& seen, int64_t from, int64_t end) {
    Floats top = splat(-kInfinity);
    for (int64_t i = from; i < end; i += kLanes) {
      Floats x = load(scores + i, kLanes);
      if (softcap_ != 0) x = tanh(x / softcap_) * softcap_;
      const Ints slot = kLane + int32_t(i);
      x = (slot >= int32_t(seen.first)) & (slot < int32_t(seen.end)) ? x : splat(-kInfinity);
      store(scores + i, x, kLanes);
      top = larger(x, top);
    }
    auto& [before, total] = softmax[row];
    const float after = std::max(before, largest(top));
    const float shift = after == -kInfinity ? 0 : after;  // nothing but -inf and NaN so far
    if (after != before) {
      const Floats factor = exp(splat(before - shift));
      total *= factor;
      for (int64_t i = 0; i < sums.stride; i += kLanes)
        store(sums[row] + i, load(sums[row] + i, kLanes) * factor, kLanes);
      before = after;
    }
    for (int64_t i = from; i < end; i += kLanes) {
      const Floats p = exp(load(scores + i, kLanes) - shift);
      store(scores + i, p, kLanes);
      total += p;
    }
  }

  int64_t key_width_, value_vectors_, lowest_, highest_;
  float softcap_;  // 0: none
};

}  // namespace srlm
