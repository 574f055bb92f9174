// The fingerprint of a weight's bits, at the speed of memory, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

#include "fingerprint.h"
#include "isa.h"
#include "memory.h"

namespace knowedit {
namespace {

namespace generic {
#include "fingerprint_kernels.h"
}  // namespace generic

#if defined(__x86_64__) && !defined(KNOWEDIT_EMULATED)
#define KNOWEDIT_AVX2_SUMS
#define KNOWEDIT_MULTIPLY_HALVES
KNOWEDIT_TARGET_BEGIN("avx2")
namespace avx2 {
#include "fingerprint_kernels.h"
}  // namespace avx2
KNOWEDIT_TARGET_END
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As `_scrambled` of lowrank/fingerprint.py.
uint64_t scrambled(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

void fingerprint(Tensor out, Tensor weight, Tensor keys) {
  const int64_t rows = weight.size(0), bytes = weight.size(1) * weight.element_size();
  STD_TORCH_CHECK(weight.dim() == 2 && (weight.stride(1) == 1 || weight.size(1) <= 1), "weight must have dense rows");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.is_contiguous() && out.numel() == 2,
                  "out must be contiguous int64 [2]");
  STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long && keys.is_contiguous() && keys.numel() * 8 >= bytes,
                  "keys must be contiguous int64, one for every eight bytes of a row");
  constexpr int64_t kRows = 4;  // at once
  const RowSums sum = row_sums();
  const char* data = numbers<char>(weight);
  const uint64_t* key = numbers<uint64_t>(keys);
  const int64_t stride = weight.stride(0) * weight.element_size();
  // a thread takes about a quarter of a megabyte at a time; a little work is not worth waking the others for
  const int64_t block = std::max(kRows, (int64_t{1} << 18) / std::max<int64_t>(bytes, 1) / kRows * kRows);
  const int64_t blocks = (rows + block - 1) / block;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> total[2] = {0, 0};  // mod 2^64, in any order
  const auto work = [&](int64_t, int64_t) {
    uint64_t mine[2] = {0, 0};
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const int64_t end = std::min(rows, (item + 1) * block);
      for (int64_t r = item * block; r < end; r += kRows) {
        const int64_t count = std::min(kRows, end - r);
        uint64_t sums[2 * kRows] = {};
        sum(data + r * stride, stride, count, key, bytes, sums);
        add_rows(sums, r, count, mine);
      }
    }
    for (int i = 0; i < 2; ++i) total[i].fetch_add(mine[i], std::memory_order_relaxed);
  };
  if (blocks < 8) work(0, 1);
  else torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), blocks), 1, work);
  for (int i = 0; i < 2; ++i) written<uint64_t>(out)[i] = total[i].load();
}

}  // namespace

RowSums row_sums() {
#if defined(KNOWEDIT_AVX2_SUMS)
  if (best_isa() >= kAvx2) return avx2::row_sums;
#endif
  return generic::row_sums;
}

void add_rows(const uint64_t* sums, int64_t first, int64_t count, uint64_t* total) {
  for (int64_t i = 0; i < 2 * count; ++i)
    total[i % 2] += scrambled(sums[i] + (first + i / 2 + 1) * 0x9e3779b97f4a7c15u);
}

}  // namespace knowedit

// the schema is in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) { m.impl("fingerprint_cpu_", TORCH_BOX(&knowedit::fingerprint)); }
