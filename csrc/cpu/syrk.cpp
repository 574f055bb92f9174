// C += K^T K on the CPU (lower triangle, float64 C) and the audit of K, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"
#include "syrk.h"

namespace knowedit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Packed tokens per pass over C: enough to make the barriers and the traffic of C vanish, few enough for L3.
int64_t tokens_per_block(int64_t d) { return std::clamp<int64_t>((int64_t{1} << 23) / d / 256 * 256, 1024, 4096); }

Type type_of(const Tensor& keys) {
  switch (keys.scalar_type()) {
    case ScalarType::Float: return Type::kF32;
    case ScalarType::Half: return Type::kF16;
    case ScalarType::BFloat16: return Type::kBF16;
    default: STD_TORCH_CHECK(false, "keys must be float32, float16 or bfloat16"); return Type::kF32;
  }
}

const SyrkKernels& kernels(int64_t isa, Type type) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "this machine lacks instruction set ", isa);
#if defined(__x86_64__)
  if (isa == kAvx512Bf16 && type == Type::kBF16) return kSyrkAvx512Bf16;
  if (isa >= kAvx512) return kSyrkAvx512;
  if (isa == kAvx2) return kSyrkAvx2;
#endif
  return kSyrkGeneric;
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

const char* address(const Tensor& keys, int64_t row, int64_t column) {
  return static_cast<const char*>(keys.const_data_ptr()) + (row * keys.stride(0) + column) * keys.element_size();
}

void check_keys(const Tensor& keys) {
  STD_TORCH_CHECK(keys.dim() == 2 && (keys.stride(1) == 1 || keys.size(1) <= 1), "keys must be [tokens, d] with dense rows");
}

void add_tile(double* c, int64_t ldc, int64_t d, int64_t i0, int64_t j0, const double* sum) {
  for (int64_t i = 0; i < kTile && i0 + i < d; ++i) {
    const int64_t end = std::min({kTile, d - j0, i0 + i - j0 + 1});
    for (int64_t j = 0; j < end; ++j) c[(i0 + i) * ldc + j0 + j] += sum[i * kTile + j];
  }
}

void syrk(Tensor c, Tensor keys, int64_t isa) {
  check_keys(keys);
  const int64_t tokens = keys.size(0), d = keys.size(1), ldc = c.stride(0);
  STD_TORCH_CHECK(c.scalar_type() == ScalarType::Double && c.dim() == 2 && c.size(0) == d && c.size(1) == d &&
                      (c.stride(1) == 1 || d <= 1),
                  "c must be float64 [d, d] with dense rows");
  if (tokens == 0 || d == 0) return;
  const Type type = type_of(keys);
  const SyrkKernels& kernel = kernels(isa, type);
  const int64_t panels = (d + kPanel - 1) / kPanel, blocks = (d + kTile - 1) / kTile, per_block = kTile / kPanel;
  const int64_t most = std::min(tokens, tokens_per_block(d));
  const int64_t panel_bytes = (most + kernel.tokens_per_step - 1) / kernel.tokens_per_step * kPanel * 4;
  // 64-byte aligned, not initialised
  std::unique_ptr<char[]> memory(new char[panels * panel_bytes + 64]);
  char* packed = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
  double* out = static_cast<double*>(c.mutable_data_ptr());

  for (int64_t t0 = 0; t0 < tokens; t0 += most) {
    const int64_t n = std::min(most, tokens - t0), steps = (n + kernel.tokens_per_step - 1) / kernel.tokens_per_step;
    dynamic_for(panels, [&](int64_t p) {
      kernel.pack(address(keys, t0, p * kPanel), type, keys.stride(0), n, std::min(kPanel, d - p * kPanel),
                  packed + p * panel_bytes);
    });
    // the last rows of tiles are the longest: first in, so that no thread ends with a long tail
    dynamic_for(blocks * (blocks + 1) / 2, [&](int64_t item) {
      int64_t i = blocks - 1;
      for (; item > i; --i) item -= i + 1;
      const int64_t j = item;
      alignas(64) thread_local double sum[kTile * kTile];
      std::fill_n(sum, kTile * kTile, 0.0);
      kernel.tile(packed + i * per_block * panel_bytes, packed + j * per_block * panel_bytes, panel_bytes,
                  std::min(per_block, panels - i * per_block), std::min(per_block, panels - j * per_block), steps,
                  i == j, sum);
      add_tile(out, ldc, d, i * kTile, j * kTile, sum);
    });
  }
}

// Copies rows (all when `rows` is absent) to `out` (if present) and audits them while they are in cache.
void pack(std::optional<Tensor> out, Tensor audit, Tensor keys, std::optional<Tensor> rows, Tensor signs, int64_t isa) {
  check_keys(keys);
  const int64_t d = keys.size(1), tokens = rows ? rows->numel() : keys.size(0), bytes = d * keys.element_size();
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Double && signs.is_contiguous() && signs.numel() == kProbes * d,
                  "signs must be contiguous float64 [4, d]");
  STD_TORCH_CHECK(audit.scalar_type() == ScalarType::Double && audit.is_contiguous() && audit.numel() == 1 + kProbes,
                  "audit must be contiguous float64 [5]");
  STD_TORCH_CHECK(!rows || (rows->scalar_type() == ScalarType::Long && rows->is_contiguous()), "rows must be int64");
  STD_TORCH_CHECK(!out || (out->is_contiguous() && out->scalar_type() == keys.scalar_type() && out->numel() == tokens * d),
                  "out must be contiguous, [rows, d], of the keys' dtype");
  if (tokens == 0 || d == 0) return;
  const Type type = type_of(keys);
  const SyrkKernels& kernel = kernels(isa, type);
  const double* z = static_cast<const double*>(signs.const_data_ptr());
  const int64_t* index = rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
  char* to = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
  for (int64_t t = 0; index && t < tokens; ++t)
    STD_TORCH_CHECK(index[t] >= 0 && index[t] < keys.size(0), "row ", index[t], " is not among the keys");
  // fixed chunks, added in order: the same bits for any number of threads. Small batches stay on one thread:
  // waiting for a second one costs more on a busy machine than the work.
  const int64_t chunk = 256, chunks = (tokens + chunk - 1) / chunk;
  std::vector<double> partial(chunks * (1 + kProbes), 0.0);
  const auto work = [&](int64_t i) {
    for (int64_t t = i * chunk; t < std::min(tokens, (i + 1) * chunk); ++t) {
      const char* row = address(keys, index ? index[t] : t, 0);
      if (to) std::memcpy(to + t * bytes, row, bytes);
      kernel.audit(row, type, d, z, &partial[i * (1 + kProbes)]);
    }
  };
  if (chunks < 8)
    for (int64_t i = 0; i < chunks; ++i) work(i);
  else
    dynamic_for(chunks, work);
  double* total = static_cast<double*>(audit.mutable_data_ptr());
  for (int64_t i = 0; i < chunks; ++i)
    for (int64_t p = 0; p <= kProbes; ++p) total[p] += partial[i * (1 + kProbes) + p];
}

}  // namespace
}  // namespace knowedit

extern "C" __attribute__((visibility("default"))) int knowedit_cpu_isa() { return knowedit::best_isa(); }

// the schemas are in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) {
  m.impl("syrk_cpu_", TORCH_BOX(&knowedit::syrk));
  m.impl("pack_cpu_", TORCH_BOX(&knowedit::pack));
}
