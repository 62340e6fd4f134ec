// `TreePlan` of kernels/srlm_kernels/tree_attention.py.
#pragma once

#include "pages.h"

namespace srlm {

struct Item {
  int32_t first_page, pages, first_query, queries;
};

struct PageEntry {
  int32_t page, position, first, end;
};

struct TreePlan {
  const Item* items;
  const PageEntry* pages;
  const int32_t *queries, *token_ptr, *token_entries;
  int64_t item_count, page_count, query_count, token_count;

  TreePlan(const Tensor& items, const Tensor& pages, const Tensor& queries, const Tensor& token_ptr,
           const Tensor& token_entries)
      : items(rows<Item>(items, "items must be [W, 4] int32")),
        pages(rows<PageEntry>(pages, "pages must be [E, 4] int32")),
        queries(rows<int32_t>(queries, "queries must be [Q] int32")),
        token_ptr(rows<int32_t>(token_ptr, "token_ptr must be [T + 1] int32")),
        token_entries(rows<int32_t>(token_entries, "token_entries must be [Q] int32")),
        item_count(items.size(0)),
        page_count(pages.size(0)),
        query_count(queries.size(0)),
        token_count(token_ptr.size(0) - 1) {
    STD_TORCH_CHECK(token_entries.size(0) == query_count, "token_entries must be [Q] int32");
  }

  // Token t has the entries token_entries[begin(t)], ..., token_entries[begin(t + 1) - 1].
  int64_t begin(int64_t token) const { return token_ptr[token]; }
  int64_t entries(int64_t token) const { return begin(token + 1) - begin(token); }

  // A plan that is wrong must not make a tile read or write what is not there.
  void check(int64_t pool_pages) const {
    for (int64_t i = 0; i < item_count; ++i) {
      const Item& item = items[i];
      STD_TORCH_CHECK(within(item.first_page, item.pages, page_count) &&
                          within(item.first_query, item.queries, query_count),
                      "item ", i, " reaches beyond the page or query entries");
      if (item.queries == 0) continue;  // padding
      for (int64_t e = item.first_page; e < item.first_page + item.pages; ++e)
        STD_TORCH_CHECK(within(pages[e].page, 1, pool_pages) && pages[e].first >= 0 &&
                            pages[e].end <= kPage,
                        "page entry ", e, " reaches beyond the pages");
      for (int64_t e = item.first_query; e < item.first_query + item.queries; ++e)
        STD_TORCH_CHECK(within(queries[e], 1, token_count), "query entry ", e, " has no token");
    }
    STD_TORCH_CHECK(token_count >= 0 && token_ptr[0] == 0, "token_ptr must start at 0");
    for (int64_t t = 0; t < token_count; ++t) {
      STD_TORCH_CHECK(within(begin(t), entries(t), query_count), "token_ptr must ascend up to Q");
      for (int64_t e = begin(t); e < begin(t + 1); ++e)
        STD_TORCH_CHECK(within(token_entries[e], 1, query_count), "token ", t, ": no such entry");
    }
  }

 private:
  template <class Row>
  static const Row* rows(const Tensor& x, const char* message) {
    constexpr int64_t kColumns = sizeof(Row) / sizeof(int32_t);
    STD_TORCH_CHECK(x.dim() == (kColumns > 1 ? 2 : 1) && (kColumns == 1 || x.size(1) == kColumns) &&
                        x.scalar_type() == ScalarType::Int && x.is_contiguous(),
                    message, ", contiguous");
    return static_cast<const Row*>(x.data_ptr());
  }

  static bool within(int64_t first, int64_t count, int64_t size) {
    return first >= 0 && count >= 0 && first + count <= size;
  }
};

}  // namespace srlm
