// Gradients of target log-probabilities in the logits, written over them:
// kernels/srlm_kernels/logits_grad.py has the equation.

#include "logits.h"

namespace srlm {
namespace {

// `out` is the memory of `logits`: what is written never reaches beyond what was read.
template <class In, class Out>
void grad_row(const In* logits, Out* out, const float* bias, int64_t columns, int64_t target,
              float lse, float upstream, const Transform& f) {
  if (upstream == 0) {  // whatever the logits hold
    std::memset(out, 0, columns * sizeof(Out));
    return;
  }
  const int32_t y = target >= 0 && target < columns ? target : -1;
  const float factor = upstream * (f.scale / f.temperature);
  const float uncap = f.softcap == 0 ? 0 : f.temperature / f.softcap;
  each_vector(columns, [&](int64_t i, int64_t count) {
    Floats z = load(logits + i, count);
    if (bias) z += load(bias + i, count);
    z = f(z);
    const Floats p = z == -kInfinity ? Floats{} : exp(z - lse);
    const Floats onehot = kLane + int32_t(i) == y ? splat(1) : Floats{};
    Floats d = (onehot - p) * factor;
    if (f.softcap != 0) {
      const Floats capped = z * uncap;
      d *= 1 - capped * capped;
    }
    store(out + i, d, count);
  });
}

template <class In, class Out>
void grad_rows(const Tensor& logits, const Tensor& target, const Tensor& lse,
               const Tensor& upstream, const float* bias, int64_t first_column,
               const Transform& transform) {
  const int64_t columns = logits.size(1);
  const auto z = rows_of<In>(logits);
  const auto targets = rows_of<const int64_t>(target);
  const auto lses = rows_of<const float>(lse), upstreams = rows_of<const float>(upstream);
  torch::stable::parallel_for(0, logits.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      grad_row(z[row], reinterpret_cast<Out*>(z[row]), bias, columns, *targets[row] - first_column,
               *lses[row], *upstreams[row], transform);
  });
}

void logits_grad(const Tensor& logits, const Tensor& target, const Tensor& lse,
                 const Tensor& upstream, const std::optional<Tensor>& bias, int64_t first_column,
                 std::optional<double> softcap, double logit_scale, double temperature,
                 bool narrow) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const bool wide = logits.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || logits.scalar_type() == ScalarType::BFloat16,
                  "logits must be fp32 or bf16");
  check_matrix(logits, rows, columns, logits.scalar_type());
  check_vector(target, rows, ScalarType::Long, "target must be [N] int64");
  check_vector(lse, rows, ScalarType::Float, "lse must be [N] fp32");
  check_vector(upstream, rows, ScalarType::Float, "upstream must be [N] fp32");
  const auto run = !wide    ? &grad_rows<BFloat16, BFloat16>
                   : narrow ? &grad_rows<float, BFloat16>
                            : &grad_rows<float, float>;
  run(logits, target, lse, upstream, bias_of(bias, columns), first_column,
      Transform(logit_scale, softcap, temperature));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "logits_grad(Tensor(a!) logits, Tensor target, Tensor lse, Tensor upstream, Tensor? bias, "
      "int first_column, float? softcap, float logit_scale, float temperature, bool narrow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("logits_grad", TORCH_BOX(&logits_grad));
}

}  // namespace srlm
