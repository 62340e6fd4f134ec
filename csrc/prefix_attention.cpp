// Attention over groups that share a prompt, and its gradients:
// kernels/srlm_kernels/prefix_attention.py has the plan.
//
// A thread computes one query head of one group, all of it and in one order: results depend on
// neither the number of threads nor on what else is packed. Keys lie in pages of 64, of which every
// segment (the prompt, or a response) has its own, so that no page has tokens that only some see.
//
// With AVX-512 only: elsewhere torch's own attention of the parts has not been found slower.
#ifdef __AVX512F__

#include <atomic>
#include <cmath>
#include <optional>

#include "attention_tile.h"
#include "prefix_groups.h"

namespace srlm {
namespace {

template <class T>
struct Call {
  Tokens<const T> query, key, value;
  int64_t tokens, heads, kv_heads, key_width, value_width, window;
  float scale, softcap;  // softcap 0: none
  std::vector<Group> groups;

  int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }

  // Calls unit(group, head) for all, the longest first; `make` gives each thread a unit.
  template <class F>
  void run(const F& make) {
    std::stable_sort(groups.begin(), groups.end(),
                     [](const Group& a, const Group& b) { return a.cost() > b.cost(); });
    std::atomic<int64_t> next = 0;
    const int64_t jobs = groups.size() * heads;
    torch::stable::parallel_for(
        0, std::min<int64_t>(jobs, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
          auto unit = make();
          for (int64_t job; (job = next++) < jobs;) unit(groups[job / heads], job % heads);
        });
  }

  // Queries are scaled: one product less for each score.
  void load_query(int64_t token, int64_t head, float* to) const {
    each_vector(key_width, [&](int64_t i, int64_t lanes) {
      store(to + i, load(query.at(token, head) + i, lanes) * scale, kLanes);
    });
  }
};

template <class T>
struct Forward {
  const Call<T>& call;
  const Tokens<T> out;
  float* const lse;          // [T, H]
  const float* const sinks;  // nullptr: none
  Packed keys, values;
  AttentionTile tile;

  Forward(const Call<T>& call, const Tensor& out, float* lse, const float* sinks)
      : call(call), out(out), lse(lse), sinks(sinks), keys(call.key_width, true),
        values(call.value_width, false), tile(call.key_width, call.value_width, call.softcap) {}

  void operator()(const Group& group, int64_t head) {
    keys.fill(group, call.key, call.kv_head(head));
    values.fill(group, call.value, call.kv_head(head));
    for (const Segment& segment : group.segments)
      for (int64_t first = 0; first < segment.length; first += AttentionTile::kRows) {
        const int64_t rows = std::min(AttentionTile::kRows, segment.length - first);
        for (int64_t r = 0; r < rows; ++r) {
          tile.position[r] = segment.position + first + r;
          call.load_query(segment.token + first + r, head, tile.queries[r]);
        }
        tile.start(rows);
        each_page(group, segment, [&](const PageEntry& entry) {
          if (tile.sees(entry, call.window).empty()) return;
          const Matrix<float> key = keys[entry.page], value = values[entry.page];
          tile.fold<float>({{key.data, key.stride}, {value.data, value.stride}}, entry,
                           call.window);
        });
        for (int64_t r = 0; r < rows; ++r) leave(r, segment.token + first + r, head);
      }
  }

  void leave(int64_t row, int64_t token, int64_t head) {
    const Softmax& found = tile.softmax[row];
    const float sink = sinks ? sinks[head] : -kInfinity, top = std::max(found.shift, sink);
    const float shift = top == -kInfinity ? 0 : top;
    const float weight = exp(splat(found.shift - shift))[0];
    const float total = weight * sum(found.total) + exp(splat(sink - shift))[0];
    lse[token * call.heads + head] = shift + std::log(total);
    each_vector(call.value_width, [&](int64_t i, int64_t lanes) {
      const Floats x = load(tile.sums[row] + i, kLanes) * weight;
      store(out.at(token, head) + i, total == 0 ? x : x / total, lanes);
    });
  }
};

// With the log-sum-exp over all keys, a page's share of the gradients is exact by itself: with
// P = e^(score - lse) and dS = P (dO V^T - dO . O) it is dS K, dS^T Q and P^T dO.
template <class T>
struct Backward {
  static constexpr int64_t kRows = 64;
  static constexpr int64_t kPart = 32;  // of a sum over dO: longer ones round more

  const Call<T>& call;
  const Tokens<const T> out, grad_out;
  const float* const lse;                    // [T, H]
  const Tokens<T> grad_query;
  const Tokens<float> grad_key, grad_value;  // of each query head
  Packed keys, key_rows, values, key_sums, value_sums, queries, upstream, results, query_sums;
  alignas(64) float p[kRows][kPage], ds[kRows][kPage];

  Backward(const Call<T>& call, const Tensor& out, const Tensor& grad_out, const float* lse,
           const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value)
      : call(call), out(out), grad_out(grad_out), lse(lse), grad_query(grad_query),
        grad_key(grad_key), grad_value(grad_value), keys(call.key_width, true),
        key_rows(call.key_width, false), values(call.value_width, true),
        key_sums(call.key_width, false), value_sums(call.value_width, false),
        queries(call.key_width, false), upstream(call.value_width, false),
        results(call.value_width, false), query_sums(call.key_width, false) {}

  void operator()(const Group& group, int64_t head) {
    keys.fill(group, call.key, call.kv_head(head));
    key_rows.fill(group, call.key, call.kv_head(head));
    values.fill(group, call.value, call.kv_head(head));
    key_sums.clear(group.pages());
    value_sums.clear(group.pages());
    for (const Segment& segment : group.segments)
      for (int64_t first = 0; first < segment.length; first += kRows)
        block(group, segment, first, head);
    for (const Segment& s : group.segments)
      for (int64_t i = 0; i < s.length; ++i) {
        put(key_sums[s.page + i / kPage][i % kPage], 1, grad_key.at(s.token + i, head),
            call.key_width);
        put(value_sums[s.page + i / kPage][i % kPage], 1, grad_value.at(s.token + i, head),
            call.value_width);
      }
  }

  template <class From, class To>
  static void put(const From* from, float scale, To* to, int64_t width) {
    each_vector(width, [&](int64_t i, int64_t lanes) {
      store(to + i, load(from + i, lanes) * scale, lanes);
    });
  }

  // Rows `first` and on of a segment, kRows at most.
  void block(const Group& group, const Segment& segment, int64_t first, int64_t head) {
    const int64_t rows = std::min(kRows, segment.length - first), token = segment.token + first;
    const int64_t position = segment.position + first;
    float shift[kRows], delta[kRows]{};
    for (Packed* x : {&queries, &upstream, &results, &query_sums}) x->clear(1);
    const Matrix<float> q = queries[0], g = upstream[0], o = results[0], sums = query_sums[0];
    for (int64_t r = 0; r < rows; ++r) {
      call.load_query(token + r, head, q[r]);
      put(grad_out.at(token + r, head), 1, g[r], call.value_width);
      put(out.at(token + r, head), 1, o[r], call.value_width);
      shift[r] = lse[(token + r) * call.heads + head];
    }
    // dO . O is summed as dO V^T is, from which it is taken: where one key has nearly all of the
    // weight the two are nearly one sum, and so is their rounding.
    for (int64_t r = 0; r < kRows; r += kBlockRows)
      for (int64_t i = 0; i < call.value_width; i += kPart) {
        float dots[kBlockRows]{};
        for (int64_t k = i; k < std::min(i + kPart, call.value_width); ++k)
          for (int64_t b = 0; b < kBlockRows; ++b)
            dots[b] = std::fma(g[r + b][k], o[r + b][k], dots[b]);
        for (int64_t b = 0; b < kBlockRows; ++b) delta[r + b] += dots[b];
      }
    each_page(group, segment, [&](const PageEntry& entry) {
      bool any = false;
      for (int64_t r = 0; r < rows; r += kBlockRows)
        any |= scores(entry, r, std::min<int64_t>(kBlockRows, rows - r), position, shift, delta);
      if (!any) return;
      for (int64_t k = 0; k < entry.end; k += kBlockRows) {
        // The rows that see one of these keys: from the first key's own on, up to the window.
        const int64_t count = std::min<int64_t>(kBlockRows, entry.end - k);
        const int64_t from = std::max<int64_t>(entry.position + k - position, 0);
        const int64_t end = std::min(entry.position + k + count - 1 - position + call.window, rows);
        if (from >= end) continue;
        const auto add = [&](float (&weights)[kRows][kPage], Matrix<float> x, Packed& to) {
          product<Into::kOngoing, float>(Transposed{weights[from] + k, kPage},
                                         {x[from], x.stride}, end - from,
                                         {to[entry.page][k], x.stride}, count, x.stride);
        };
        add(p, g, value_sums);
        add(ds, q, key_sums);
      }
    });
    for (int64_t r = 0; r < rows; ++r)
      put(sums[r], call.scale, grad_query.at(token + r, head), call.key_width);
  }

  // P and dS of some rows and a page, 0 for keys that a row does not see, and dS K; whether any is
  // seen.
  bool scores(const PageEntry& entry, int64_t row, int64_t count, int64_t position,
              const float* shift, const float* delta) {
    Slots seen[kBlockRows], any{kPage, 0};
    for (int64_t r = 0; r < count; ++r) {
      seen[r] = visible(entry, position + row + r, call.window);
      if (!seen[r].empty())
        any = {std::min(any.first, seen[r].first), std::max(any.end, seen[r].end)};
      std::fill_n(p[row + r], kPage, 0.0f);
      std::fill_n(ds[row + r], kPage, 0.0f);
    }
    if (any.empty()) return false;
    const int64_t from = any.first / kLanes * kLanes, span = vectors_of(any.end - from) * kLanes;
    const Matrix<float> q = queries[0], g = upstream[0], key = keys[entry.page];
    const Matrix<float> value = values[entry.page];
    product<Into::kNew, float>({q[row], q.stride}, {key[0] + from, kPage}, call.key_width,
                               {p[row] + from, kPage}, count, span);
    for (int64_t i = 0; i < call.value_width; i += kPart)
      product<Into::kTotal, float>({g[row] + i, g.stride}, {value[i] + from, kPage},
                                   std::min(kPart, call.value_width - i), {ds[row] + from, kPage},
                                   count, span);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = from; i < from + span; i += kLanes) {
        float *const weight = &p[row + r][i], *const slope = &ds[row + r][i];
        Floats x = load(weight, kLanes), bend = splat(1.0f);
        if (call.softcap != 0) {
          const Floats t = tanh(x / call.softcap);
          x = t * call.softcap;
          bend -= t * t;
        }
        const Ints slot = kLane + int32_t(i);
        const Ints sees = (slot >= int32_t(seen[r].first)) & (slot < int32_t(seen[r].end));
        x = exp(x - shift[row + r]);
        store(weight, sees ? x : Floats{}, kLanes);
        x *= (load(slope, kLanes) - delta[row + r]) * bend;
        store(slope, sees ? x : Floats{}, kLanes);
      }
    const Matrix<float> by_key = key_rows[entry.page], sums = query_sums[0];
    product<Into::kOngoing, float>({ds[row] + any.first, kPage},
                                   {by_key[any.first], by_key.stride}, any.end - any.first,
                                   {sums[row], sums.stride}, count, sums.stride);
    return true;
  }
};

template <class T>
Call<T> call_of(const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& segments, double scale, std::optional<int64_t> window,
                std::optional<double> softcap) {
  return {.query = Tokens<const T>(query),
          .key = Tokens<const T>(key),
          .value = Tokens<const T>(value),
          .tokens = query.size(0),
          .heads = query.size(1),
          .kv_heads = key.size(1),
          .key_width = query.size(2),
          .value_width = value.size(2),
          .window = window.value_or(int64_t{1} << 40),
          .scale = float(scale),
          .softcap = float(softcap.value_or(0)),
          .groups = groups_of(segments, query.size(0))};
}

void check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lse) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                  "query, key and value must be [T, H, D]");
  const ScalarType dtype = query.scalar_type();
  const int64_t tokens = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "query must be fp32 or bf16");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "H must be a multiple of Hkv");
  const char* const message = "query, key and value must share T and dtype, unit last stride";
  check_tokens(query, tokens, heads, query.size(2), dtype, message);
  check_tokens(key, tokens, kv_heads, query.size(2), dtype, message);
  check_tokens(value, tokens, kv_heads, value.size(2), dtype, message);
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == tokens && lse.size(1) == heads &&
                      lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "lse must be [T, H] fp32, contiguous");
}

void prefix_attention(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
                      const Tensor& value, const Tensor& segments,
                      const std::optional<Tensor>& sinks, double scale,
                      std::optional<int64_t> window, std::optional<double> softcap) {
  check(query, key, value, lse);
  const int64_t tokens = query.size(0), heads = query.size(1);
  check_tokens(out, tokens, heads, value.size(2), query.scalar_type(), "out must be [T, H, Dv]");
  STD_TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == heads &&
                             sinks->is_contiguous() && sinks->scalar_type() == ScalarType::Float),
                  "sinks must be [H] fp32, contiguous");
  const auto run = [&](auto type) {
    using T = decltype(type);
    auto call = call_of<T>(query, key, value, segments, scale, window, softcap);
    call.run([&] {
      return Forward<T>(call, out, static_cast<float*>(lse.data_ptr()),
                        sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr);
    });
  };
  if (query.scalar_type() == ScalarType::Float) run(float{});
  else run(BFloat16{});
}

void prefix_attention_backward(const Tensor& grad_query, const Tensor& grad_key,
                               const Tensor& grad_value, const Tensor& grad_out, const Tensor& out,
                               const Tensor& lse, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Tensor& segments, double scale,
                               std::optional<int64_t> window, std::optional<double> softcap) {
  check(query, key, value, lse);
  const int64_t tokens = query.size(0), heads = query.size(1);
  const int64_t key_width = query.size(2), value_width = value.size(2);
  const ScalarType dtype = query.scalar_type();
  check_tokens(grad_query, tokens, heads, key_width, dtype, "grad_query must be like query");
  check_tokens(grad_key, tokens, heads, key_width, ScalarType::Float,
               "grad_key must be [T, H, Dk] fp32");
  check_tokens(grad_value, tokens, heads, value_width, ScalarType::Float,
               "grad_value must be [T, H, Dv] fp32");
  for (const Tensor* x : {&out, &grad_out})
    check_tokens(*x, tokens, heads, value_width, dtype, "out and grad_out must be [T, H, Dv]");
  const auto run = [&](auto type) {
    using T = decltype(type);
    auto call = call_of<T>(query, key, value, segments, scale, window, softcap);
    call.run([&] {
      return Backward<T>(call, out, grad_out, static_cast<const float*>(lse.data_ptr()),
                         grad_query, grad_key, grad_value);
    });
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(BFloat16{});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "prefix_attention(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, Tensor value, "
      "Tensor segments, Tensor? sinks, float scale, int? window, float? softcap) -> ()");
  library.def(
      "prefix_attention_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value, Tensor grad_out, Tensor out, Tensor lse, Tensor query, Tensor key, "
      "Tensor value, Tensor segments, float scale, int? window, float? softcap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  library.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}

}  // namespace srlm

#endif
