// What both ops share: checks and views of the arguments, and how logits become final.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "simd.h"

namespace srlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Final logits: softcap(scale * (logits + bias)) / temperature, the bias added before.
struct Transform {
  float scale, softcap, temperature;  // softcap 0: none
  bool none;

  Transform(double scale, std::optional<double> softcap, double temperature)
      : scale(scale),
        softcap(softcap.value_or(0)),
        temperature(temperature),
        none(scale == 1 && !softcap && temperature == 1) {}

  Floats operator()(Floats z) const {
    if (none) return z;
    z *= scale;
    if (softcap != 0) z = tanh(z / softcap) * softcap;
    return z / temperature;
  }
};

// A matrix with unit column stride, or (one column, any stride) a vector.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <class T>
Rows<T> rows_of(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.size(0) > 1 ? x.stride(0) : 0};
}

inline void check_matrix(const Tensor& x, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns,
                  "logits and ref_logits must be [N, C]");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "logits and ref_logits must share a dtype");
  STD_TORCH_CHECK(columns < 2 || x.stride(1) == 1, "logits must have unit column stride");
}

inline void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const char* message) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.scalar_type() == dtype, message);
}

// nullptr without a bias.
inline const float* bias_of(const std::optional<Tensor>& bias, int64_t columns) {
  if (!bias) return nullptr;
  check_vector(*bias, columns, ScalarType::Float, "bias must be [C] fp32");
  STD_TORCH_CHECK(bias->is_contiguous(), "bias must be contiguous");
  return static_cast<const float*>(bias->data_ptr());
}

// Rows per thread below which a thread costs more than it saves.
inline int64_t grain(int64_t columns) { return 1 + 16384 / (columns + 1); }

}  // namespace srlm
