// Attention over the pages of a prefix tree: kernels/srlm_kernels/tree_attention.py has the plan.
//
// Threads take tiles, the longest first. A token with one query entry is finished by its tile; for
// others each tile leaves the state of a softmax, and these are merged at the end.

#include <atomic>
#include <optional>

#include "attention_tile.h"

namespace srlm {
namespace {

// A softmax over some of the keys of a token.
struct Part {
  float weight;  // Softmax::shift, until the parts are merged
  float total;
  float* sums;
};

// sum_i e^shift_i sums_i / (sum_i e^shift_i total_i + e^sink) over the parts at(i), i < count; 0
// where no key was seen.
template <class T, class F>
void merge(int64_t count, const F& at, float sink, int64_t width, T* out) {
  float top = sink;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, at(i).weight);
  const float shift = top == -kInfinity ? 0 : top;
  float total = exp(splat(sink - shift))[0];
  for (int64_t i = 0; i < count; ++i) {
    Part& part = at(i);
    part.weight = exp(splat(part.weight - shift))[0];
    total += part.weight * part.total;
  }
  each_vector(width, [&](int64_t i, int64_t lanes) {
    Floats x{};
    for (int64_t p = 0; p < count; ++p) x += at(p).weight * load(at(p).sums + i, kLanes);
    store(out + i, total == 0 ? x : x / total, lanes);
  });
}

// Rows of an item; a query entry has a row for each of the heads that share a KV head.
struct Work {
  const Item* item;
  int64_t first_row, rows;
  int64_t cost() const { return rows * item->pages; }
};

std::vector<Work> work_of(const TreePlan& plan, int64_t group) {
  std::vector<Work> works;
  works.reserve(plan.item_count);
  for (const Item* item = plan.items; item != plan.items + plan.item_count; ++item)
    for (int64_t row = 0, rows = item->queries * group; row < rows; row += AttentionTile::kRows)
      works.push_back({item, row, std::min(AttentionTile::kRows, rows - row)});
  std::stable_sort(works.begin(), works.end(),
                   [](const Work& a, const Work& b) { return a.cost() > b.cost(); });
  return works;
}

// Rows that read a bf16 page as fast where it lies as in an fp32 copy.
constexpr int64_t kFewRows = 8;

template <class T>
struct Attention {
  Tokens<T> out;
  Tokens<const T> query;
  Pages<const T> keys, values;
  TreePlan plan;
  const int32_t* position;
  const float* sinks;  // nullptr: none
  Part* parts;         // [Q, H], or nullptr where every token has one entry at most
  int64_t heads, kv_heads, key_width, value_width, window;
  float scale, softcap;  // softcap 0: none

  int64_t group() const { return heads / kv_heads; }
  float sink(int64_t head) const { return sinks ? sinks[head] : -kInfinity; }

  void run() {
    const auto works = work_of(plan, group());
    int64_t cost = 0;
    for (const Work& work : works) cost += work.cost() * kv_heads;
    const int64_t jobs = works.size() * kv_heads;
    std::atomic<int64_t> next = 0;
    // Below a few microseconds of work a second thread costs more than it saves.
    const int64_t threads = cost < 100 ? 1 : torch::stable::get_num_threads();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      AttentionTile tile(key_width, value_width, softcap);
      for (int64_t job; (job = next++) < jobs;)
        attend(tile, works[job / kv_heads], job % kv_heads);
    });
    torch::stable::parallel_for(0, plan.token_count * heads, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(i / heads, i % heads);
    });
  }

  void attend(AttentionTile& tile, const Work& work, int64_t kv_head) const {
    const auto entry_of = [&](int64_t row) {
      return work.item->first_query + (work.first_row + row) / group();
    };
    const auto head_of = [&](int64_t row) {
      return kv_head * group() + (work.first_row + row) % group();
    };
    for (int64_t row = 0; row < work.rows; ++row) {
      const int64_t token = plan.queries[entry_of(row)];
      const T* q = query.at(token, head_of(row));
      tile.position[row] = position[token];
      each_vector(key_width, [&](int64_t i, int64_t lanes) {
        store(tile.queries[row] + i, load(q + i, lanes) * scale, kLanes);
      });
    }
    tile.start(work.rows);
    const PageEntry* entry = plan.pages + work.item->first_page;
    for (const PageEntry* end = entry + work.item->pages; entry != end; ++entry) {
      const Slots seen = tile.sees(*entry, window);
      if (!seen.empty()) fold(tile, *entry, kv_head, seen);
    }
    for (int64_t row = 0; row < work.rows; ++row) leave(tile, row, entry_of(row), head_of(row));
  }

  // A page is read where it lies if its layout allows, and is copied otherwise, or if so many rows
  // read it that it is better widened once.
  void fold(AttentionTile& tile, const PageEntry& entry, int64_t kv_head, const Slots& seen) const {
    const T* key = keys.at(entry.page, kv_head);
    const T* value = values.at(entry.page, kv_head);
    if (as_is() && (std::is_same_v<T, float> || tile.rows <= kFewRows))
      return tile.fold<T>({{key, keys.dim_stride}, {value, values.slot_stride}}, entry, window);
    copy(key, keys.dim_stride, keys.slot_stride, key_width, kPage, tile.keys);
    copy(value + seen.first * values.slot_stride, values.slot_stride, values.dim_stride,
         seen.end - seen.first, value_width, {tile.values[seen.first], tile.values.stride});
    tile.fold<float>({{tile.keys[0], tile.keys.stride}, {tile.values[0], tile.values.stride}},
                     entry, window);
  }

  bool as_is() const {
    return keys.slot_stride == 1 && values.dim_stride == 1 && value_width % kLanes == 0;
  }

  static void copy(const T* from, int64_t down, int64_t along, int64_t rows, int64_t columns,
                   Matrix<float> to) {
    for (int64_t row = 0; row < rows; ++row, from += down) {
      if (along == 1) {
        each_vector(columns, [&](int64_t i, int64_t lanes) {
          store(to[row] + i, load(from + i, lanes), kLanes);
        });
      } else {
        each_vector(columns, [&](int64_t i, int64_t lanes) {
          T buffer[kLanes]{};
          for (int64_t lane = 0; lane < lanes; ++lane) buffer[lane] = from[(i + lane) * along];
          store(to[row] + i, load(buffer, kLanes), kLanes);
        });
      }
    }
  }

  // Writes the result of a token with this one entry, or a part of it.
  void leave(AttentionTile& tile, int64_t row, int64_t entry, int64_t head) const {
    const Softmax& softmax = tile.softmax[row];
    Part own{softmax.shift, sum(softmax.total), tile.sums[row]};
    const int64_t token = plan.queries[entry];
    if (plan.entries(token) == 1)
      return merge(1, [&](int64_t) -> Part& { return own; }, sink(head), value_width,
                   out.at(token, head));
    Part& part = parts[entry * heads + head];
    part.weight = own.weight;
    part.total = own.total;
    std::memcpy(part.sums, own.sums, tile.sums.stride * sizeof(float));
  }

  void finish(int64_t token, int64_t head) const {
    const int64_t count = plan.entries(token);
    if (count == 1) return;
    const int32_t* entries = plan.token_entries + plan.begin(token);
    merge(count, [&](int64_t i) -> Part& { return parts[entries[i] * heads + head]; }, sink(head),
          value_width, out.at(token, head));
  }
};

// Room for a part of every query entry and head, all empty. It is kept for the next call: fresh
// memory costs more page faults than the parts of a decode step cost time.
Part* empty_parts(int64_t count, int64_t width) {
  thread_local std::vector<Floats> sums;
  thread_local std::vector<Part> parts;
  const int64_t vectors = vectors_of(width);
  if (int64_t(parts.size()) < count) parts.resize(count);
  if (int64_t(sums.size()) < count * vectors) sums.resize(count * vectors);
  for (int64_t i = 0; i < count; ++i)
    parts[i] = {-kInfinity, 0, reinterpret_cast<float*>(&sums[i * vectors])};
  return parts.data();
}

bool needs_parts(const TreePlan& plan) {
  for (int64_t t = 0; t < plan.token_count; ++t)
    if (plan.entries(t) > 1) return true;
  return false;
}

void tree_attention(const Tensor& out, const Tensor& query, const Tensor& key_pages,
                    const Tensor& value_pages, const Tensor& items, const Tensor& pages,
                    const Tensor& queries, const Tensor& token_ptr, const Tensor& token_entries,
                    const Tensor& position, const std::optional<Tensor>& sinks, double scale,
                    std::optional<int64_t> window, std::optional<double> softcap) {
  check_pages(key_pages, value_pages);
  STD_TORCH_CHECK(query.dim() == 3, "query must be [T, H, Dk]");
  const int64_t tokens = query.size(0), heads = query.size(1), kv_heads = key_pages.size(1);
  const int64_t key_width = key_pages.size(3), value_width = value_pages.size(3);
  const ScalarType dtype = key_pages.scalar_type();
  const bool wide = dtype == ScalarType::Float;
  STD_TORCH_CHECK(wide || dtype == ScalarType::BFloat16, "pages must be fp32 or bf16");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "H must be a multiple of Hkv");
  check_tokens(query, tokens, heads, key_width, dtype,
               "query must be [T, H, Dk] in the dtype of the pages, unit last stride");
  check_tokens(out, tokens, heads, value_width, dtype,
               "out must be [T, H, Dv] in the dtype of the pages, unit last stride");
  STD_TORCH_CHECK(position.dim() == 1 && position.size(0) == tokens && position.is_contiguous() &&
                      position.scalar_type() == ScalarType::Int,
                  "position must be [T] int32, contiguous");
  STD_TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == heads &&
                             sinks->is_contiguous() && sinks->scalar_type() == ScalarType::Float),
                  "sinks must be [H] fp32, contiguous");
  const TreePlan plan(items, pages, queries, token_ptr, token_entries);
  STD_TORCH_CHECK(plan.token_count == tokens, "token_ptr must be [T + 1] int32");
  plan.check(key_pages.size(0));

  const auto run = [&](auto type) {
    using T = decltype(type);
    Attention<T>{.out = Tokens<T>(out),
                 .query = Tokens<const T>(query),
                 .keys = Pages<const T>(key_pages),
                 .values = Pages<const T>(value_pages),
                 .plan = plan,
                 .position = static_cast<const int32_t*>(position.data_ptr()),
                 .sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr,
                 .parts = needs_parts(plan) ? empty_parts(plan.query_count * heads, value_width)
                                            : nullptr,
                 .heads = heads,
                 .kv_heads = kv_heads,
                 .key_width = key_width,
                 .value_width = value_width,
                 .window = window.value_or(int64_t{1} << 40),
                 .scale = float(scale),
                 .softcap = float(softcap.value_or(0))}
        .run();
  };
  if (wide) run(float{});
  else run(BFloat16{});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "tree_attention(Tensor(a!) out, Tensor query, Tensor key_pages, Tensor value_pages, "
      "Tensor items, Tensor pages, Tensor queries, Tensor token_ptr, Tensor token_entries, "
      "Tensor position, Tensor? sinks, float scale, int? window, float? softcap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("tree_attention", TORCH_BOX(&tree_attention));
}

}  // namespace srlm
