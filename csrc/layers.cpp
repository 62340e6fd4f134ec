// What lies between the matrix products of a transformer, each in one pass over memory, and the
// gradients: kernels/srlm_kernels/layers.py.
//
// A row (or, without sums, a vector) depends on nothing beside it, and is rounded once.

#include <algorithm>
#include <cmath>

#include "logits.h"
#include "pages.h"

namespace srlm {
namespace {

constexpr int64_t kBlock = 64;  // rows whose share of the weight's gradient is added up in one go

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Calls f(first, last) for parts of `count`, where an item costs as much as `width` numbers.
template <class F>
void in_parallel(int64_t count, int64_t width, const F& f) {
  torch::stable::parallel_for(0, count, grain(width), f);
}

template <class T>
void rms_norm_rows(const Tensor& out, const Tensor& rstd, const Tensor& x, const Tensor& weight,
                   float offset, float eps) {
  const int64_t width = weight.size(0);
  const T *from = data_of<T>(x), *w = data_of<T>(weight);
  T* to = data_of<T>(out);
  float* found = data_of<float>(rstd);
  in_parallel(rstd.size(0), width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = from + row * width;
      Floats squares{};
      each_vector(width, [&](int64_t i, int64_t lanes) {
        const Floats v = load(in + i, lanes);
        squares += v * v;
      });
      const float r = found[row] = 1 / std::sqrt(sum(squares) / width + eps);
      each_vector(width, [&](int64_t i, int64_t lanes) {
        store(to + row * width + i, load(in + i, lanes) * r * (load(w + i, lanes) + offset), lanes);
      });
    }
  });
}

// y = x r w with r = (mean(x^2) + eps)^-1/2, so dx = r (g w - x r^2 mean(g w x)), dw = sum g x r.
// `grad_weight` [ceil(N / kBlock), D]: a part for every block of rows, whatever thread it is on.
template <class T>
void rms_norm_grads(const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad,
                    const Tensor& x, const Tensor& weight, const Tensor& rstd, float offset) {
  const int64_t width = weight.size(0), rows = rstd.size(0);
  const T *from = data_of<T>(x), *w = data_of<T>(weight), *upstream = data_of<T>(grad);
  T* to = data_of<T>(grad_x);
  const float* found = data_of<float>(rstd);
  in_parallel(grad_weight.size(0), kBlock * width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, rows); ++row) {
      const T *in = from + row * width, *g = upstream + row * width;
      const float r = found[row];
      float* part = data_of<float>(grad_weight) + row / kBlock * width;
      Floats products{};
      each_vector(width, [&](int64_t i, int64_t lanes) {
        const Floats gx = load(g + i, lanes) * load(in + i, lanes);
        products += gx * (load(w + i, lanes) + offset);
        const Floats sofar = row % kBlock ? load(part + i, lanes) : Floats{};
        store(part + i, sofar + gx * r, lanes);
      });
      const float pull = sum(products) / width * r * r;
      each_vector(width, [&](int64_t i, int64_t lanes) {
        const Floats gw = load(g + i, lanes) * (load(w + i, lanes) + offset);
        store(to + row * width + i, (gw - load(in + i, lanes) * pull) * r, lanes);
      });
    }
  });
}

// Calls f(i, lanes) for the vectors of `size` numbers.
template <class F>
void each_vector_in_parallel(int64_t size, const F& f) {
  in_parallel(vectors_of(size), kLanes, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = std::min(end * kLanes, size);
    each_vector(last - first, [&](int64_t i, int64_t lanes) { f(first + i, lanes); });
  });
}

// gate sigmoid(gate) up
template <class T>
void swiglu_all(const Tensor& out, const Tensor& gate, const Tensor& up) {
  const T *a = data_of<T>(gate), *b = data_of<T>(up);
  T* to = data_of<T>(out);
  each_vector_in_parallel(out.numel(), [&](int64_t i, int64_t lanes) {
    const Floats x = load(a + i, lanes);
    store(to + i, x / (1 + exp(-x)) * load(b + i, lanes), lanes);
  });
}

template <class T>
void swiglu_grads(const Tensor& grad_gate, const Tensor& grad_up, const Tensor& grad,
                  const Tensor& gate, const Tensor& up) {
  const T *g = data_of<T>(grad), *a = data_of<T>(gate), *b = data_of<T>(up);
  T *to_gate = data_of<T>(grad_gate), *to_up = data_of<T>(grad_up);
  each_vector_in_parallel(grad.numel(), [&](int64_t i, int64_t lanes) {
    const Floats x = load(a + i, lanes), y = load(g + i, lanes);
    const Floats sigmoid = 1 / (1 + exp(-x));
    store(to_up + i, y * x * sigmoid, lanes);
    store(to_gate + i, y * load(b + i, lanes) * sigmoid * (1 + x * (1 - sigmoid)), lanes);
  });
}

// A head's halves (a, b) become (a cos - b sin, b cos + a sin), cos and sin of each half its own;
// `transposed`: what takes gradients back.
template <class T>
void rotate_row(const T* x, T* out, const T* cos, const T* sin, int64_t half, bool transposed) {
  each_vector(half, [&](int64_t i, int64_t lanes) {
    const Floats a = load(x + i, lanes), b = load(x + half + i, lanes);
    const Floats sin_a = load(sin + i, lanes), sin_b = load(sin + half + i, lanes);
    const Floats from_b = transposed ? sin_b : -sin_a, from_a = transposed ? -sin_a : sin_b;
    store(out + i, a * load(cos + i, lanes) + b * from_b, lanes);
    store(out + half + i, b * load(cos + half + i, lanes) + a * from_a, lanes);
  });
}

template <class T>
void rotate(const Tensor& out, const Tensor& x, const Tensor& cos, const Tensor& sin,
            bool transposed) {
  const int64_t heads = x.size(1), width = x.size(2);
  const Tokens<const T> from(x);
  const Tokens<T> to(out);
  in_parallel(x.size(0), heads * width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t head = 0; head < heads; ++head)
        rotate_row(from.at(t, head), to.at(t, head), data_of<T>(cos) + t * width,
                   data_of<T>(sin) + t * width, width / 2, transposed);
  });
}

void check_like(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == like.numel() &&
                      x.scalar_type() == like.scalar_type(),
                  "tensors must be contiguous, of one size and dtype");
}

bool is_wide(const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || x.scalar_type() == ScalarType::BFloat16, "x must be fp32 or bf16");
  return wide;
}

void check_norm(const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() &&
                      weight.scalar_type() == x.scalar_type(),
                  "weight must be [D], contiguous, in the dtype of x");
  check_vector(rstd, rstd.numel(), ScalarType::Float, "rstd must be [N] fp32");
  STD_TORCH_CHECK(rstd.is_contiguous() && x.numel() == rstd.size(0) * weight.size(0),
                  "x must be [N, D]");
}

void rms_norm(const Tensor& out, const Tensor& rstd, const Tensor& x, const Tensor& weight,
              double offset, double eps) {
  check_like(x, x);
  check_like(out, x);
  check_norm(x, weight, rstd);
  (is_wide(x) ? &rms_norm_rows<float> : &rms_norm_rows<BFloat16>)(out, rstd, x, weight, offset,
                                                                  eps);
}

void rms_norm_backward(const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad,
                       const Tensor& x, const Tensor& weight, const Tensor& rstd, double offset) {
  for (const Tensor* tensor : {&x, &grad_x, &grad}) check_like(*tensor, x);
  check_norm(x, weight, rstd);
  STD_TORCH_CHECK(grad_weight.dim() == 2 && grad_weight.is_contiguous() &&
                      grad_weight.size(0) == (rstd.size(0) + kBlock - 1) / kBlock &&
                      grad_weight.size(1) == weight.size(0) &&
                      grad_weight.scalar_type() == ScalarType::Float,
                  "grad_weight must be [N / 64 rounded up, D] fp32, contiguous");
  (is_wide(x) ? &rms_norm_grads<float> : &rms_norm_grads<BFloat16>)(grad_x, grad_weight, grad, x,
                                                                    weight, rstd, offset);
}

void swiglu(const Tensor& out, const Tensor& gate, const Tensor& up) {
  for (const Tensor* tensor : {&gate, &up, &out}) check_like(*tensor, gate);
  (is_wide(gate) ? &swiglu_all<float> : &swiglu_all<BFloat16>)(out, gate, up);
}

void swiglu_backward(const Tensor& grad_gate, const Tensor& grad_up, const Tensor& grad,
                     const Tensor& gate, const Tensor& up) {
  for (const Tensor* tensor : {&gate, &up, &grad, &grad_gate, &grad_up}) check_like(*tensor, gate);
  (is_wide(gate) ? &swiglu_grads<float> : &swiglu_grads<BFloat16>)(grad_gate, grad_up, grad, gate,
                                                                   up);
}

void rotary(const Tensor& out, const Tensor& x, const Tensor& cos, const Tensor& sin,
            bool transposed) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "x must be [T, H, D] of even D");
  const int64_t tokens = x.size(0), heads = x.size(1), width = x.size(2);
  const ScalarType dtype = x.scalar_type();
  for (const Tensor* tensor : {&x, &out})
    check_tokens(*tensor, tokens, heads, width, dtype, "x and out must have unit last stride");
  for (const Tensor* tensor : {&cos, &sin})
    STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == tokens * width &&
                        tensor->scalar_type() == dtype,
                    "cos and sin must be [T, D], contiguous, in the dtype of x");
  (is_wide(x) ? &rotate<float> : &rotate<BFloat16>)(out, x, cos, sin, transposed);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "rms_norm(Tensor(a!) out, Tensor(b!) rstd, Tensor x, Tensor weight, float offset, "
      "float eps) -> ()");
  library.def(
      "rms_norm_backward(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor grad, Tensor x, "
      "Tensor weight, Tensor rstd, float offset) -> ()");
  library.def("swiglu(Tensor(a!) out, Tensor gate, Tensor up) -> ()");
  library.def(
      "swiglu_backward(Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor grad, Tensor gate, "
      "Tensor up) -> ()");
  library.def("rotary(Tensor(a!) out, Tensor x, Tensor cos, Tensor sin, bool transposed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  library.impl("rotary", TORCH_BOX(&rotary));
}

}  // namespace srlm
