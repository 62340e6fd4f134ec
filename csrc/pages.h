// How the attention ops see memory: tokens, and pages of 64 positions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace srlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPage = 64;

// Queries, keys, values or results of tokens [T, H, D], unit last stride.
template <class T>
struct Tokens {
  T* data;
  int64_t token_stride, head_stride;

  explicit Tokens(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())), token_stride(x.stride(0)), head_stride(x.stride(1)) {}

  T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// Keys or values of one layer [P, Hkv, 64, D], any strides.
template <class T>
struct Pages {
  T* data;
  int64_t page_stride, head_stride, slot_stride, dim_stride;

  explicit Pages(const Tensor& x)
      : data(static_cast<T*>(x.data_ptr())),
        page_stride(x.stride(0)),
        head_stride(x.stride(1)),
        slot_stride(x.stride(2)),
        dim_stride(x.stride(3)) {}

  T* at(int64_t page, int64_t head) const { return data + page * page_stride + head * head_stride; }
};

inline void check_tokens(const Tensor& x, int64_t tokens, int64_t heads, int64_t width,
                         ScalarType dtype, const char* message) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == tokens && x.size(1) == heads &&
                      x.size(2) == width && x.scalar_type() == dtype &&
                      (width < 2 || x.stride(2) == 1),
                  message);
}

inline void check_pages(const Tensor& keys, const Tensor& values) {
  STD_TORCH_CHECK(keys.dim() == 4 && keys.size(2) == kPage, "key_pages must be [P, Hkv, 64, Dk]");
  STD_TORCH_CHECK(values.dim() == 4 && values.size(0) == keys.size(0) &&
                      values.size(1) == keys.size(1) && values.size(2) == kPage &&
                      values.scalar_type() == keys.scalar_type(),
                  "value_pages must be [P, Hkv, 64, Dv] in the dtype of key_pages");
}

}  // namespace srlm
