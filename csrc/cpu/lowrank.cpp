// W += U V^T on the CPU in one pass over W, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "isa.h"
#include "lowrank.h"

namespace knowedit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 8 * kStrip;  // rows a thread takes at a time: the strip of V in L1 serves all of them
constexpr int64_t kWorthSharing = int64_t{1} << 25;  // multiply-adds: about a millisecond

WeightType type_of(const Tensor& w) {
  switch (w.scalar_type()) {
    case ScalarType::BFloat16: return WeightType::kBF16;
    case ScalarType::Half: return WeightType::kF16;
    case ScalarType::Float: return WeightType::kF32;
    default: STD_TORCH_CHECK(false, "w must be bfloat16, float16 or float32"); return WeightType::kF32;
  }
}

const UpdateKernel* kernels(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "this machine lacks instruction set ", isa);
#if defined(__x86_64__)
  if (isa >= kAvx512) return kUpdateAvx512;
  if (isa == kAvx2) return kUpdateAvx2;
#endif
  return kUpdateGeneric;
}

SeeKernel see_kernel(int64_t isa) {
#if defined(__x86_64__)
  if (isa >= kAvx512) return kSeeAvx512;
  if (isa == kAvx2) return kSeeAvx2;
#endif
  return kSeeGeneric;
}

bool is_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
         (t.stride(1) == 1 || columns <= 1);
}

// out [rank, width] = x [count, rank] transposed, zero-padded to `width` columns
void pack(const float* x, int64_t rank, int64_t count, int64_t width, float* out) {
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t i = 0; i < width; ++i) out[k * width + i] = i < count ? x[i * rank + k] : 0.0f;
}

void update(Tensor w, Tensor base, Tensor u, Tensor v, int64_t rounding, int64_t seed, int64_t stream,
            std::optional<Tensor> plane, std::optional<Tensor> probe, bool write, Tensor sums,
            std::optional<Tensor> error, int64_t isa) {
  const int64_t rows = w.size(0), columns = w.size(1), rank = u.size(1), size = w.element_size();
  const int64_t keys = probe ? probe->size(1) : 0;
  const WeightType type = type_of(w);
  STD_TORCH_CHECK(is_matrix(w, w.scalar_type(), rows, columns) && is_matrix(base, w.scalar_type(), rows, columns),
                  "w and base must be alike, with dense rows");
  STD_TORCH_CHECK(is_matrix(u, ScalarType::Float, rows, rank) && u.is_contiguous() &&
                      is_matrix(v, ScalarType::Float, columns, rank) && v.is_contiguous(),
                  "u and v must be contiguous float32 [rows, rank] and [columns, rank]");
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2 && (rounding == 2) == plane.has_value(), "bad rounding");
  STD_TORCH_CHECK(!plane || is_matrix(*plane, ScalarType::BFloat16, rows, columns), "the residual must be bfloat16");
  STD_TORCH_CHECK(probe.has_value() == error.has_value() &&
                      (!probe || (is_matrix(*probe, ScalarType::Float, columns, keys) && probe->is_contiguous() &&
                                  is_matrix(*error, ScalarType::Float, rows, keys) && error->is_contiguous())),
                  "probe and error must be contiguous float32 [columns, keys] and [rows, keys]");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.numel() == kSums,
                  "sums must be contiguous float64 [5]");

  const int64_t panels = (columns + kUpdateWidth - 1) / kUpdateWidth, blocks = (rows + kBlock - 1) / kBlock;
  std::vector<float> right(panels * rank * kUpdateWidth);
  std::vector<double> partial(blocks * kSums * kSumLanes, 0.0);
  const float *pu = static_cast<const float*>(u.const_data_ptr()), *pv = static_cast<const float*>(v.const_data_ptr());
  // the probe with whole vectors of keys
  const int64_t padded = (keys + kProbeLanes - 1) / kProbeLanes * kProbeLanes;
  std::vector<float> seen(columns * padded, 0.0f);
  for (int64_t c = 0; c < (keys ? columns : 0); ++c)
    std::copy_n(static_cast<const float*>(probe->const_data_ptr()) + c * keys, keys, &seen[c * padded]);
  // asked once: through the stable ABI each answer is a call, and a strip is a tenth of a microsecond
  char *to = static_cast<char*>(write ? w.mutable_data_ptr() : nullptr), *rest = nullptr;
  char* from = static_cast<char*>(const_cast<void*>(base.const_data_ptr()));
  if (plane) rest = static_cast<char*>(plane->mutable_data_ptr());
  const int64_t to_stride = w.stride(0) * size, from_stride = base.stride(0) * size;
  const int64_t rest_stride = plane ? plane->stride(0) * 2 : 0;
  const SeeKernel see = see_kernel(isa);
  const UpdateKernel kernel = kernels(isa)[static_cast<int>(type)];
  // One item at a time, so that nobody waits for a slow core; a little work is not worth waking the others for.
  auto share = [](int64_t count, int64_t steps, auto&& work) {
    if (steps < kWorthSharing) {
      for (int64_t item = 0; item < count; ++item) work(item);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), count), 1, [&](int64_t, int64_t) {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
    });
  };
  share(panels, columns * rank * 16, [&](int64_t p) {
    pack(pv + p * kUpdateWidth * rank, rank, std::min(kUpdateWidth, columns - p * kUpdateWidth), kUpdateWidth,
         &right[p * rank * kUpdateWidth]);
  });
  share(blocks, rows * columns * (rank + 16), [&](int64_t block) {
    const int64_t first = block * kBlock, last = std::min(rows, first + kBlock);
    std::vector<float> left(rank * kBlock);
    alignas(64) float e[kStrip * kUpdateWidth] = {};  // a last strip has fewer rows
    for (int64_t r = first; r < last; r += kStrip)
      pack(pu + r * rank, rank, std::min(kStrip, last - r), kStrip, &left[(r - first) * rank]);
    std::vector<float> errors(kBlock * padded, 0.0f);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = p * kUpdateWidth, width = std::min(kUpdateWidth, columns - column);
      for (int64_t r = first; r < last; r += kStrip) {
        const auto at = [&](char* data, int64_t stride, int64_t bytes) { return data + r * stride + column * bytes; };
        const UpdateStrip strip{
            &left[(r - first) * rank], &right[p * rank * kUpdateWidth], rank,
            write ? at(to, to_stride, size) : nullptr, at(from, from_stride, size), rest ? at(rest, rest_stride, 2) : nullptr,
            to_stride, from_stride, rest_stride,
            std::min(kStrip, last - r), width, r, column, static_cast<Rounding>(rounding), write,
            static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), probe ? e : nullptr};
        kernel(strip, &partial[block * kSums * kSumLanes]);
        if (keys) see(e, width, &seen[column * padded], padded, &errors[(r - first) * padded]);
      }
    }
    for (int64_t r = first; keys && r < last; ++r)
      std::copy_n(&errors[(r - first) * padded], keys, static_cast<float*>(error->mutable_data_ptr()) + r * keys);
  });
  double* total = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(total, kSums, 0.0);
  // in order: the same bits every time
  for (size_t i = 0; i < partial.size(); ++i) total[i / kSumLanes % kSums] += partial[i];
}

}  // namespace
}  // namespace knowedit

// the schema is in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) { m.impl("low_rank_cpu_", TORCH_BOX(&knowedit::update)); }
