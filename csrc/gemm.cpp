// Matrix products with fp32 sums whatever their operands: kernels/srlm_kernels/products.py.
//
// Libraries round products of bf16 matrices to bf16, so that what is added up over chunks has lost
// its digits already; and the one that torch calls for fp32 leaves half of the registers of some
// CPUs idle. Every result is summed in one order, whatever block or thread it falls to.
#ifdef __AVX512F__

#include "gemm.h"

namespace srlm {
namespace {

template <class T>
Lines<T> lines_of(const Tensor& x, int64_t dim) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(dim), x.stride(1 - dim)};
}

template <class W, class T>
void run(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const Product<T> p{lines_of<T>(a, 0), lines_of<T>(b, 1), a.size(0), b.size(1), a.size(1)};
  if (out.scalar_type() == ScalarType::Float) gemm<W>(rows_of<float>(out), p, add);
  else gemm<W>(rows_of<BFloat16>(out), p, add);
}

// Whether products of bf16 in pairs take fewer cycles than those of floats: on Intel's cores, which
// mean matrices of bf16 for AMX, they take more.
bool pairs_are_fast() {
#ifdef __AVX512BF16__
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

void check(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(0) == 1 || x.stride(1) == 1),
                  "out, a and b must be matrices with unit row or column stride");
}

// out = a b, or out += a b.
void gemm_op(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  for (const Tensor* x : {&out, &a, &b}) check(*x);
  const ScalarType dtype = a.scalar_type();
  STD_TORCH_CHECK(dtype == b.scalar_type() &&
                      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "a and b must both be fp32 or both bf16");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float ||
                      out.scalar_type() == ScalarType::BFloat16,
                  "out must be fp32 or bf16");
  STD_TORCH_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
                  "shapes must be [M, N] for [M, K] and [K, N]");
  STD_TORCH_CHECK(out.size(1) < 2 || out.stride(1) == 1, "out must have unit column stride");
  if (out.size(0) == 0 || out.size(1) == 0) return;
  if (dtype == ScalarType::Float) run<float, float>(out, a, b, add);
  else if (pairs_are_fast()) run<BFloat16, BFloat16>(out, a, b, add);
  else run<float, BFloat16>(out, a, b, add);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def("gemm(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("gemm", TORCH_BOX(&gemm_op));
}

}  // namespace srlm

#endif
