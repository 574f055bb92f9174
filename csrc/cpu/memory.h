// Where a tensor's numbers lie, for every driver.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace knowedit {

// A storage may be freed under its tensor, as sharded training does: torch's own operators refuse such a tensor, too.
inline void check_memory(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.const_data_ptr() || t.numel() == 0, "a tensor's memory is not there: its storage was freed");
}

template <class T>
const T* numbers(const torch::stable::Tensor& t) {
  check_memory(t);
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* written(torch::stable::Tensor& t) {
  check_memory(t);
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace knowedit
