// Groups of a prompt and its responses, and their vectors in pages of 64 tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "block_product.h"
#include "tile.h"
#include "tree_plan.h"

namespace srlm {

struct Segment {
  int64_t token, length, position;  // the first token, and its position
  int64_t page;                     // the first of its pages in the group's

  int64_t pages() const { return (length + kPage - 1) / kPage; }
  PageEntry entry(int64_t i) const {
    return {int32_t(page + i), int32_t(position + i * kPage), 0,
            int32_t(std::min(kPage, length - i * kPage))};
  }
};

// A prompt and its responses.
struct Group {
  std::vector<Segment> segments;

  int64_t pages() const { return segments.back().page + segments.back().pages(); }
  int64_t cost() const {
    int64_t cost = 0;
    for (const Segment& s : segments) cost += s.length * (2 * s.position + s.length);
    return cost;
  }
};

// From [S, 2] int32: length and first position of each segment, which is 0 for prompts alone.
inline std::vector<Group> groups_of(const Tensor& segments, int64_t tokens) {
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 2 && segments.is_contiguous() &&
                      segments.scalar_type() == ScalarType::Int,
                  "segments must be [S, 2] int32, contiguous");
  const auto* const given = static_cast<const int32_t*>(segments.data_ptr());
  std::vector<Group> groups;
  int64_t token = 0;
  for (int64_t i = 0; i < segments.size(0); ++i) {
    const int64_t length = given[2 * i], position = given[2 * i + 1];
    if (position == 0) groups.emplace_back();
    STD_TORCH_CHECK(length > 0 && !groups.empty(), "a segment is empty, or has no prompt");
    auto& own = groups.back().segments;
    STD_TORCH_CHECK(position == 0 || position == own[0].length, "responses follow their prompt");
    own.push_back({token, length, position, own.empty() ? 0 : groups.back().pages()});
    token += length;
  }
  STD_TORCH_CHECK(token == tokens, "segments must cover the tokens");
  return groups;
}

// Calls f(entry) for the pages that tokens of `segment` may see, in the order of positions.
template <class F>
void each_page(const Group& group, const Segment& segment, const F& f) {
  const Segment& prompt = group.segments[0];
  for (int64_t i = 0; i < prompt.pages(); ++i) f(prompt.entry(i));
  if (&segment == &prompt) return;
  for (int64_t i = 0; i < segment.pages(); ++i) f(segment.entry(i));
}

// Vectors of one head in pages [64, width], in whole vectors of zeros behind, or [width, 64].
class Packed {
 public:
  Packed(int64_t width, bool transposed)
      : width_(width),
        columns_(transposed ? kPage : vectors_of(width) * kLanes),
        size_(columns_ * (transposed ? width : kPage)),
        transposed_(transposed) {}

  int64_t columns() const { return columns_; }
  Matrix<float> operator[](int64_t page) {
    return {reinterpret_cast<float*>(memory_.data()) + page * size_, columns_};
  }
  void clear(int64_t pages) { memory_.assign(pages * size_ / kLanes, Floats{}); }

  template <class T>
  void fill(const Group& group, const Tokens<const T>& from, int64_t head) {
    memory_.resize(group.pages() * size_ / kLanes);
    for (const Segment& s : group.segments)
      for (int64_t i = 0; i < s.length; i += kLanes) {
        const int64_t count = std::min(kLanes, s.length - i), slot = i % kPage;
        const Matrix<float> to = (*this)[s.page + i / kPage];
        for (int64_t d = 0; d < width_; d += kLanes) {
          const int64_t lanes = std::min(kLanes, width_ - d);
          Tile tile{};
          for (int64_t t = 0; t < count; ++t)
            tile[t] = (Words)load(from.at(s.token + i + t, head) + d, lanes);
          if (transposed_) transpose(tile);
          const int64_t rows = transposed_ ? lanes : kLanes;
          for (int64_t r = 0; r < rows; ++r)
            store(transposed_ ? to[d + r] + slot : to[slot + r] + d, (Floats)tile[r], kLanes);
        }
      }
  }

 private:
  int64_t width_, columns_, size_;
  bool transposed_;
  std::vector<Floats> memory_;
};

}  // namespace srlm
