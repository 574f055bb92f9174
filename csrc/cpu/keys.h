// Keys as torch hands them over, and threads that share the work on them: for every driver of the second moment.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "memory.h"
#include "syrk.h"

namespace knowedit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& keys) {
  switch (keys.scalar_type()) {
    case ScalarType::Float: return Type::kF32;
    case ScalarType::Half: return Type::kF16;
    case ScalarType::BFloat16: return Type::kBF16;
    case ScalarType::Double: return Type::kF64;
    default: STD_TORCH_CHECK(false, "keys must be float64, float32, float16 or bfloat16"); return Type::kF32;
  }
}

inline void check_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "this machine lacks instruction set ", isa);
}

// Threads take work items one at a time: on a busy machine equal shares would wait for the slowest core.
template <class F>
void dynamic_for(int64_t count, const F& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
  });
}

inline const char* address(const Tensor& keys, int64_t row, int64_t column) {
  return static_cast<const char*>(keys.const_data_ptr()) + (row * keys.stride(0) + column) * keys.element_size();
}

inline void check_keys(const Tensor& keys) {
  STD_TORCH_CHECK(keys.dim() == 2 && (keys.stride(1) == 1 || keys.size(1) <= 1), "keys must be [tokens, d] with dense rows");
  check_memory(keys);
}

}  // namespace knowedit
