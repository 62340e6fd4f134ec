// Keys and values of new tokens into their slots: kernels/srlm_kernels/kv_write.py.

#include <cstring>

#include "pages.h"

namespace srlm {
namespace {

// Tokens that go to neighbouring slots of one page.
struct Run {
  int64_t token, count, slot;
};

template <class Word>
void copy_run(const Run& run, const Tokens<const Word>& tokens, int64_t heads, int64_t width,
              const Pages<Word>& pages) {
  for (int64_t head = 0; head < heads; ++head) {
    const Word* from = tokens.at(run.token, head);
    Word* to = pages.at(run.slot / kPage, head) + run.slot % kPage * pages.slot_stride;
    if (pages.dim_stride == 1) {
      for (int64_t i = 0; i < run.count; ++i)
        std::memcpy(to + i * pages.slot_stride, from + i * tokens.token_stride,
                    width * sizeof(Word));
    } else {  // transposed: what lies side by side is one dimension of the run
      for (int64_t d = 0; d < width; ++d)
        for (int64_t i = 0; i < run.count; ++i)
          to[d * pages.dim_stride + i * pages.slot_stride] = from[i * tokens.token_stride + d];
    }
  }
}

template <class F>
void each_run(const int64_t* slot, int64_t begin, int64_t end, const F& f) {
  for (int64_t t = begin; t < end;) {
    Run run{t, 1, slot[t]};
    while (++t < end && slot[t] == slot[t - 1] + 1 && slot[t] % kPage != 0) ++run.count;
    if (run.slot >= 0) f(run);
  }
}

template <class Word>
void write(const Tensor& key, const Tensor& value, const Tensor& key_pages,
           const Tensor& value_pages, const int64_t* slot) {
  const Tokens<const Word> keys(key), values(value);
  const Pages<Word> to_keys(key_pages), to_values(value_pages);
  const int64_t heads = key.size(1), key_width = key.size(2), value_width = value.size(2);
  const int64_t grain = 1 + 8192 / (1 + heads * (key_width + value_width));
  torch::stable::parallel_for(0, key.size(0), grain, [&](int64_t begin, int64_t end) {
    each_run(slot, begin, end, [&](const Run& run) {
      copy_run(run, keys, heads, key_width, to_keys);
      copy_run(run, values, heads, value_width, to_values);
    });
  });
}

void kv_write(const Tensor& key, const Tensor& value, const Tensor& key_pages,
              const Tensor& value_pages, const Tensor& slot) {
  check_pages(key_pages, value_pages);
  const int64_t heads = key_pages.size(1), tokens = slot.dim() == 1 ? slot.size(0) : -1;
  const ScalarType dtype = key_pages.scalar_type();
  STD_TORCH_CHECK(tokens >= 0 && slot.scalar_type() == ScalarType::Long && slot.is_contiguous(),
                  "slot must be [T] int64, contiguous");
  check_tokens(key, tokens, heads, key_pages.size(3), dtype,
               "key must be [T, Hkv, Dk] in the dtype of the pages, unit last stride");
  check_tokens(value, tokens, heads, value_pages.size(3), dtype,
               "value must be [T, Hkv, Dv] in the dtype of the pages, unit last stride");
  const auto* slots = static_cast<const int64_t*>(slot.data_ptr());
  const int64_t slot_count = key_pages.size(0) * kPage;
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(slots[t] < slot_count, "slot ", slots[t], " is past the last page");
  STD_TORCH_CHECK(key.element_size() == 2 || key.element_size() == 4, "elements of 2 or 4 bytes");
  const auto run = key.element_size() == 2 ? &write<uint16_t> : &write<uint32_t>;
  run(key, value, key_pages, value_pages, slots);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(srlm_kernels_c, library) {
  library.def(
      "kv_write(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, "
      "Tensor slot) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srlm_kernels_c, CPU, library) {
  library.impl("kv_write", TORCH_BOX(&kv_write));
}

}  // namespace srlm
