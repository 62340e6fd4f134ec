// Draws a token per row of logits: kernels/srlm_kernels/sample.py says what is computed, and what a
// gap and a cutoff are. One thread draws a row in a fixed order, so that results do not depend on
// the number of threads.

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "cutoff.h"
#include "logits.h"

namespace srlm {
namespace {

using Bytes = uint8_t __attribute__((vector_size(kLanes)));

template <class T>
struct Row {
  const T* logits;
  int64_t columns;
  const float* bias;             // nullptr: none
  const uint8_t *seen, *banned;  // nullptr: no token
  float penalty;

  bool as_it_came() const { return !bias && !seen && !banned; }
};

struct Settings {
  float temperature, top_p, min_p;
  int32_t top_k;
  double uniform;

  bool greedy() const { return temperature == 0 || top_k == 1; }
  bool cuts() const { return top_k > 0 || top_p < 1 || min_p > 0; }
  float sharpness() const {
    return greedy() ? 1 : std::min(1 / temperature, std::numeric_limits<float>::max());
  }
};

struct Result {
  int64_t token;
  float logprob, sample_logprob, kept_mass;
};

// What one thread needs for rows of that many columns.
struct Scratch {
  std::unique_ptr<float[]> scores;
  std::unique_ptr<double[]> blocks;
  Entries tops, candidates;

  explicit Scratch(int64_t columns)
      : scores(new float[columns]),
        blocks(new double[blocks_of(columns)]),
        tops(blocks_of(columns) * kLanes),
        candidates(columns) {}
};

Ints is_set(const uint8_t* from, int64_t count) {
  Bytes x{};
  std::memcpy(&x, from, count);
  return __builtin_convertvector(x, Ints) != 0;
}

// The scores that temperature is applied to: the logits as they came, or what `buffer` then holds.
template <class T>
const float* processed(const Row<T>& row, float* buffer) {
  if constexpr (std::is_same_v<T, float>)
    if (row.as_it_came()) return row.logits;
  each_vector(row.columns, [&](int64_t i, int64_t count) {
    Floats x = load(row.logits + i, count);
    if (row.bias) x += load(row.bias + i, count);
    if (row.seen)
      x = is_set(row.seen + i, count) ? (x > 0 ? x / row.penalty : x * row.penalty) : x;
    if (row.banned) x = is_set(row.banned + i, count) ? splat(-kInfinity) : x;
    store(buffer + i, x, count);
  });
  return buffer;
}

template <class T>
double log_sum_exp(const T* logits, int64_t columns) {
  Floats top = splat(-kInfinity);
  each_vector(columns, [&](int64_t i, int64_t count) {
    top = larger(load_or(logits + i, count, -kInfinity), top);
  });
  const float best = largest(top);
  Total total;
  each_vector(columns, [&](int64_t i, int64_t count) {
    total.add(exp(load_or(logits + i, count, -kInfinity) - best));
  });
  return best + std::log(total.sum());
}

template <class T>
Result draw(const Row<T>& row, const Settings& settings, Scratch& scratch) {
  const float* const x = processed(row, scratch.scores.get());
  const Gap gap{best_of(x, row.columns, scratch.tops), settings.sharpness()};
  const Cdf all(x, row.columns, gap, -kInfinity, scratch.blocks.get());
  Result result{0, NAN, NAN, NAN};
  // NaN or +inf somewhere, or nothing but -inf, make NaN of the mass.
  if (!std::isnan(all.mass)) {
    double kept = all.mass;
    if (settings.greedy()) {
      result.token = std::find(x, x + row.columns, gap.best) - x;
      kept = 1;
    } else if (settings.cuts()) {
      Entries& some = scratch.candidates;
      const Limits limits{settings.top_k, settings.top_p, settings.min_p};
      const float cutoff = limits.cutoff(x, row.columns, gap, all.mass, scratch.tops, some);
      const Cdf cdf(some.gap.get(), some.count, Gap{}, cutoff, scratch.blocks.get());
      result.token = some.id[cdf.at(settings.uniform * cdf.mass)];
      kept = cdf.mass;
    } else {
      result.token = all.at(settings.uniform * all.mass);
    }
    result.sample_logprob = settings.greedy() ? 0 : gap(x[result.token]) - std::log(kept);
    result.kept_mass = std::min(kept / all.mass, 1.0);
  }
  const double lse = !row.as_it_came()    ? log_sum_exp(row.logits, row.columns)
                     : gap.sharpness != 1 ? log_sum_exp(x, row.columns)
                                          : gap.best + std::log(all.mass);
  result.logprob = load(row.logits + result.token, 1)[0] - lse;
  return result;
}

// A multiple of 2^-48 in [0, 1): splitmix64 of the seed at that step.
double uniform(uint64_t seed, uint64_t step) {
  uint64_t x = seed + (step + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return double((x ^ (x >> 31)) >> 16) * 0x1p-48;
}

// A parameter of each row, or the same for all.
template <class T>
struct PerRow {
  std::optional<Rows<const T>> rows;
  T otherwise;

  PerRow(const std::optional<Tensor>& x, int64_t size, ScalarType dtype, T otherwise)
      : otherwise(otherwise) {
    if (!x) return;
    check_vector(*x, size, dtype, "parameters must be [R], fp32 or (top_k, min_tokens) int32");
    rows = rows_of<const T>(*x);
  }
  T operator[](int64_t row) const { return rows ? *(*rows)[row] : otherwise; }
};

// What the rows of one call are drawn with.
struct Call {
  int64_t columns;
  PerRow<float> temperature, top_p, min_p, penalty;
  PerRow<int32_t> top_k, min_tokens;
  Rows<const int64_t> seed, step;
  const float* bias;  // nullptr: none
  std::optional<Rows<const uint8_t>> seen;
  const uint8_t* is_stop;  // nullptr: no token

  template <class T>
  Result operator()(const T* logits, int64_t r, Scratch& scratch) const {
    const bool marks = seen && penalty[r] != 1, bans = is_stop && *step[r] < min_tokens[r];
    const Row<T> row{logits, columns, bias, marks ? (*seen)[r] : nullptr, bans ? is_stop : nullptr,
                     penalty[r]};
    const Settings settings{temperature[r], top_p[r], min_p[r], top_k[r],
                            uniform(*seed[r], *step[r])};
    return draw(row, settings, scratch);
  }
};

template <class T>
void draw_rows(const Call& call, const Tensor& logits, const Tensor& token, const Tensor& numbers,
               const Tensor& stopped) {
  const int64_t rows = logits.size(0);
  const auto z = rows_of<const T>(logits);
  const auto tokens = rows_of<int64_t>(token);
  const auto ends = rows_of<bool>(stopped);
  float* const out = static_cast<float*>(numbers.data_ptr());
  torch::stable::parallel_for(0, rows, grain(call.columns), [&](int64_t begin, int64_t end) {
    Scratch scratch(call.columns);
    for (int64_t r = begin; r < end; ++r) {
      const Result result = call(z[r], r, scratch);
      *tokens[r] = result.token;
      *ends[r] = call.is_stop && call.is_stop[result.token];
      out[r] = result.logprob;
      out[rows + r] = result.sample_logprob;
      out[2 * rows + r] = result.kept_mass;
    }
  });
}

void sample(const Tensor& token, const Tensor& numbers, const Tensor& stopped, const Tensor& logits,
            const Tensor& seed, const Tensor& step, const Tensor& temperature,
            const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
            const std::optional<Tensor>& min_p, const std::optional<Tensor>& repetition_penalty,
            const std::optional<Tensor>& min_tokens, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& seen, const std::optional<Tensor>& is_stop) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const ScalarType dtype = logits.scalar_type();
  constexpr ScalarType kFloat = ScalarType::Float, kInt = ScalarType::Int;
  STD_TORCH_CHECK(dtype == kFloat || dtype == ScalarType::BFloat16,
                  "logits must be fp32 or bf16");
  check_matrix(logits, rows, columns, dtype);
  STD_TORCH_CHECK(columns > 0 || rows == 0, "there is no token to draw");
  check_vector(token, rows, ScalarType::Long, "token must be [R] int64");
  check_vector(stopped, rows, ScalarType::Bool, "stopped must be [R] bool");
  check_vector(seed, rows, ScalarType::Long, "seed must be [R] int64");
  check_vector(step, rows, ScalarType::Long, "step must be [R] int64");
  STD_TORCH_CHECK(numbers.dim() == 2 && numbers.size(0) == 3 && numbers.size(1) == rows &&
                      numbers.scalar_type() == kFloat && numbers.is_contiguous(),
                  "numbers must be [3, R] fp32, contiguous");
  STD_TORCH_CHECK(!seen || (seen->dim() == 2 && seen->size(0) == rows &&
                            seen->size(1) == columns && (columns < 2 || seen->stride(1) == 1) &&
                            seen->scalar_type() == ScalarType::Bool),
                  "seen must be [R, V] bool, unit column stride");
  STD_TORCH_CHECK(!is_stop || (is_stop->dim() == 1 && is_stop->size(0) == columns &&
                               is_stop->is_contiguous() &&
                               is_stop->scalar_type() == ScalarType::Bool),
                  "is_stop must be [V] bool, contiguous");
  Call call{.columns = columns,
            .temperature = {temperature, rows, kFloat, 1},
            .top_p = {top_p, rows, kFloat, 1},
            .min_p = {min_p, rows, kFloat, 0},
            .penalty = {repetition_penalty, rows, kFloat, 1},
            .top_k = {top_k, rows, kInt, 0},
            .min_tokens = {min_tokens, rows, kInt, 0},
            .seed = rows_of<const int64_t>(seed),
            .step = rows_of<const int64_t>(step),
            .bias = bias_of(bias, columns),
            .seen = {},
            .is_stop = is_stop ? static_cast<const uint8_t*>(is_stop->data_ptr()) : nullptr};
  if (seen) call.seen = rows_of<const uint8_t>(*seen);
  if (dtype == kFloat) draw_rows<float>(call, logits, token, numbers, stopped);
  else draw_rows<BFloat16>(call, logits, token, numbers, stopped);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "sample(Tensor(a!) token, Tensor(b!) numbers, Tensor(c!) stopped, Tensor logits, "
      "Tensor seed, Tensor step, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
      "Tensor? repetition_penalty, Tensor? min_tokens, Tensor? bias, Tensor? seen, "
      "Tensor? is_stop) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("sample", TORCH_BOX(&sample));
}

}  // namespace srlm
