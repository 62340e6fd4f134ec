// Attention of a tile: rows that read the same pages, with an online softmax each.
//
// A row's result depends on its query, its pages and their order alone, bit for bit: each of its
// sums has one order, and values that only its mates see are never multiplied into it.
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

// What a softmax needs to go on, or to be merged with that of other pages.
struct Softmax {
  // How far scores may exceed `shift` before everything is scaled to a new one. Each new largest
  // score would do it otherwise, and be a branch that the processor does not foresee.
  static constexpr float kSlack = 8;

  float shift = -kInfinity;
  Floats total{};  // sum of e^(score - shift), in lanes
};

// One page for one KV head: keys [Dk, 64], values [64, Dv in whole vectors].
template <class T>
struct PageView {
  Matrix<const T> keys, values;
};

class AttentionTile {
 public:
  static constexpr int64_t kRows = 128;

  AttentionTile(int64_t key_width, int64_t value_width, float softcap)
      : key_width_(key_width), softcap_(softcap) {
    const struct {
      Matrix<float>* matrix;
      int64_t rows, vectors;
    } parts[] = {{&queries, kRows, vectors_of(key_width)},
                 {&sums, kRows, vectors_of(value_width)},
                 {&keys, key_width, vectors_of(kPage)},
                 {&values, kPage, vectors_of(value_width)}};
    int64_t size = 0;
    for (const auto& part : parts) size += part.rows * part.vectors;
    // Kept for the next call: fresh memory costs more page faults than a small tile costs time.
    thread_local std::vector<Floats> memory;
    if (int64_t(memory.size()) < size) memory.resize(size);
    Floats* next = memory.data();
    for (const auto& part : parts) {
      *part.matrix = {reinterpret_cast<float*>(next), part.vectors * kLanes};
      next += part.rows * part.vectors;
    }
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
  Matrix<float> sums;     // [rows, Dv]: sum of e^(score - shift) value
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
    const int64_t from = any.first / kLanes * kLanes, span = vectors_of(any.end - from);
    product<Into::kNew, T>({queries[row], queries.stride},
                           {page.keys[0] + from, page.keys.stride}, key_width_,
                           {weights[0] + from, kPage}, count, span * kLanes);
    as_constant<kPage / kLanes>(span, [&](auto vectors) {
      for (int64_t r = 0; r < count; ++r) {
        const Slots slots{seen[r].first - from, seen[r].end - from};
        exponentiate<vectors>(row + r, weights[r] + from, slots);
      }
    });

    // Rows see most keys together; those at the ends, which only some see, are added one by one.
    const auto add = [&](int64_t r, int64_t many, int64_t first, int64_t end) {
      if (first < end)
        product<Into::kOngoing, T>({weights[r] + first, kPage},
                                   {page.values[first], page.values.stride}, end - first,
                                   {sums[row + r], sums.stride}, many, sums.stride);
    };
    for (int64_t r = 0; r < count; ++r)
      add(r, 1, seen[r].first, std::min(seen[r].end, all.first));
    add(0, count, all.first, all.end);
    for (int64_t r = 0; r < count; ++r)
      add(r, 1, std::max(seen[r].first, all.end), seen[r].end);
  }

  // Scores become e^(score - shift), 0 for keys that the row does not see, whatever lies there.
  template <int kVectors>
  [[gnu::always_inline]] void exponentiate(int64_t row, float* scores, const Slots& seen) {
    const uint32_t count = seen.empty() ? 0 : seen.end - seen.first;
    Floats x[kVectors], top = splat(-kInfinity);
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load(scores + v * kLanes, kLanes);
      if (softcap_ != 0) x[v] = tanh(x[v] / softcap_) * softcap_;
      const Words slot = (Words)(kLane + int32_t(v * kLanes - seen.first));
      x[v] = slot < count ? x[v] : splat(-kInfinity);
      top = larger(x[v], top);
    }
    auto& [shift, total] = softmax[row];
    if (const float peak = largest(top); peak > shift + Softmax::kSlack) {
      const Floats factor = exp(splat(shift - peak));
      total *= factor;
      for (int64_t i = 0; i < sums.stride; i += kLanes)
        store(sums[row] + i, load(sums[row] + i, kLanes) * factor, kLanes);
      shift = peak;
    }
    const float finite = shift == -kInfinity ? 0 : shift;  // nothing but -inf and NaN so far
    Floats sum{};
    for (int v = 0; v < kVectors; ++v) {
      x[v] = exp(x[v] - finite);
      store(scores + v * kLanes, x[v], kLanes);
      sum += x[v];
    }
    total += sum;
  }

  int64_t key_width_, lowest_, highest_;
  float softcap_;  // 0: none
};

}  // namespace srlm
