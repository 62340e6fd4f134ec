// Log-sum-exps of rows of logits, policy and reference in one read: the state is described in
// kernels/srlm_kernels/row_stats.py. One thread folds a row, from left to right, so that results do
// not depend on the number of threads.

#include <algorithm>
#include <cmath>

#include "logits.h"

namespace srlm {
namespace {

enum { kPolicyMax, kRefMax = 2, kExtMax = 4, kTarget = 6, kRefTarget, kWeighted, kTotal, kSquares };
constexpr int64_t kRows = 8, kRowsWithOutputs = 11;

// Columns that are held in the first-level cache: read once from memory, then twice from there.
constexpr int64_t kColumns = 1024;
using Block = Floats[kColumns / kLanes];

struct Stream {
  float max;
  double sum;
};

struct Outputs {
  double weighted, total, squares;
};

// Writes the final logits, -inf in the lanes past `columns`, and returns the largest.
template <class T>
[[gnu::noinline]] float stage(Block& z, const T* logits, const float* bias, int64_t columns,
                              const Transform& transform) {
  Floats top = splat(-kInfinity);
  each_vector(columns, [&](int64_t i, int64_t count) {
    Floats x = load(logits + i, count);
    if (bias) x += load(bias + i, count);
    x = transform(x);
    if (count < kLanes) x = kLane < int32_t(count) ? x : splat(-kInfinity);
    z[i / kLanes] = x;
    top = larger(x, top);
  });
  return largest(top);
}

// Writes (1+l) z - l z_ref, so that equal logits give back z exactly, and returns the largest.
float extrapolate(Block& mixed, const Block& z, const Block& z_ref, int64_t count, float strength) {
  Floats top = splat(-kInfinity);
  for (int64_t i = 0; i * kLanes < count; ++i) {
    const Floats x = z[i] + strength * (z[i] - z_ref[i]);
    mixed[i] = (z[i] == -kInfinity) | (z_ref[i] == -kInfinity) ? splat(-kInfinity) : x;
    top = larger(mixed[i], top);
  }
  return largest(top);
}

template <bool kOutputs>
[[gnu::noinline]] void fold(const Block& z, int64_t count, float top, Stream& stream,
                            Outputs* outputs) {
  const float before = stream.max;
  stream.max = std::max(before, top);
  const float shift = stream.max == -kInfinity ? 0 : stream.max;  // nothing but -inf so far
  if (stream.max != before) {
    const double back = double(before) - shift, factor = std::exp(back);
    if constexpr (kOutputs) {
      const double moved = stream.sum == 0 ? 0 : stream.sum * back;
      outputs->weighted = factor * (outputs->weighted + moved);
      outputs->squares *= factor * factor;
    }
    stream.sum *= factor;
  }
  Floats sums{}, weighted{}, total{}, squares{};
  for (int64_t i = 0; i * kLanes < count; ++i) {
    const Floats d = z[i] - shift, e = exp(d);
    sums += e;
    if constexpr (kOutputs) {
      weighted += e == 0 ? Floats{} : e * d;  // 0, not NaN, for a logit of -inf
      total += kLane < int32_t(count - i * kLanes) ? z[i] : Floats{};
      squares += e * e;
    }
  }
  stream.sum += sum(sums);
  if constexpr (kOutputs) {
    outputs->weighted += sum(weighted);
    outputs->total += sum(total);
    outputs->squares += sum(squares);
  }
}

template <class T>
struct Logits {
  Rows<const T> rows;
  const float* bias;  // nullptr: none

  Logits(const Tensor& x, const float* bias) : rows(rows_of<const T>(x)), bias(bias) {}
};

// What the rows of one call share.
template <class T>
struct FoldRow {
  Logits<T> policy;
  std::optional<Logits<T>> reference;
  std::optional<float> extrapolation;
  Transform transform;
  int64_t columns;
  bool with_outputs;

  // `at(k)` is this row's entry in row k of the state; `target` is a column of the logits, or none.
  template <class State>
  void operator()(const State& at, int64_t row, int64_t target) const {
    const auto get = [&](int k) { return Stream{at(k), at(k + 1)}; };
    Stream p = get(kPolicyMax), r = get(kRefMax), e = get(kExtMax);
    Outputs outputs{};
    if (with_outputs) outputs = {at(kWeighted), at(kTotal), at(kSquares)};
    Block z, z_ref, mixed;
    for (int64_t first = 0; first < columns; first += kColumns) {
      const int64_t count = std::min(kColumns, columns - first), y = target - first;
      const auto read = [&](Block& block, const Logits<T>& x, float& target_logit) {
        const float* bias = x.bias ? x.bias + first : nullptr;
        const float top = stage(block, x.rows[row] + first, bias, count, transform);
        if (y >= 0 && y < count) target_logit = block[y / kLanes][y % kLanes];
        return top;
      };
      const float top = read(z, policy, at(kTarget));
      if (with_outputs) fold<true>(z, count, top, p, &outputs);
      else fold<false>(z, count, top, p, nullptr);
      if (!reference) continue;
      fold<false>(z_ref, count, read(z_ref, *reference, at(kRefTarget)), r, nullptr);
      if (!extrapolation) continue;
      fold<false>(mixed, count, extrapolate(mixed, z, z_ref, count, *extrapolation), e, nullptr);
    }
    const auto put = [&](int k, const Stream& s) {
      at(k) = s.max;
      at(k + 1) = s.sum;
    };
    put(kPolicyMax, p);
    put(kRefMax, r);
    put(kExtMax, e);
    if (!with_outputs) return;
    at(kWeighted) = outputs.weighted;
    at(kTotal) = outputs.total;
    at(kSquares) = outputs.squares;
  }
};

template <class T>
void fold_rows(const FoldRow<T>& fold_row, const Tensor& state, const Tensor& target,
               int64_t first_column) {
  const auto targets = rows_of<const int64_t>(target);
  float* const data = static_cast<float*>(state.data_ptr());
  const int64_t down = state.stride(0), along = state.stride(1), rows = state.size(1);
  torch::stable::parallel_for(0, rows, grain(fold_row.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto at = [&](int k) -> float& { return data[k * down + row * along]; };
      fold_row(at, row, *targets[row] - first_column);
    }
  });
}

void row_stats(const Tensor& state, const Tensor& logits, const Tensor& target,
               const std::optional<Tensor>& ref_logits, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& ref_bias, int64_t first_column,
               std::optional<double> extrapolation, std::optional<double> softcap,
               double logit_scale, double temperature) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "logits must be fp32 or bf16");
  check_matrix(logits, rows, columns, dtype);
  if (ref_logits) check_matrix(*ref_logits, rows, columns, dtype);
  check_vector(target, rows, ScalarType::Long, "target must be [N] int64");
  STD_TORCH_CHECK(state.dim() == 2 && state.size(1) == rows &&
                      state.scalar_type() == ScalarType::Float &&
                      (state.size(0) == kRows || state.size(0) == kRowsWithOutputs),
                  "state must be [8, N] or [11, N] fp32");
  STD_TORCH_CHECK(ref_logits || !extrapolation, "extrapolation needs ref_logits");
  const auto run = [&](auto type) {
    using T = decltype(type);
    FoldRow<T> fold_row{.policy = {logits, bias_of(bias, columns)},
                        .reference = {},
                        .extrapolation = extrapolation,
                        .transform = {logit_scale, softcap, temperature},
                        .columns = columns,
                        .with_outputs = state.size(0) == kRowsWithOutputs};
    if (ref_logits) fold_row.reference.emplace(*ref_logits, bias_of(ref_bias, columns));
    fold_rows(fold_row, state, target, first_column);
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(BFloat16{});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "row_stats(Tensor(a!) state, Tensor logits, Tensor target, Tensor? ref_logits, Tensor? bias, "
      "Tensor? ref_bias, int first_column, float? extrapolation, float? softcap, "
      "float logit_scale, float temperature) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("row_stats", TORCH_BOX(&row_stats));
}

}  // namespace srlm
