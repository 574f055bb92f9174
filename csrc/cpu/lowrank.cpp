// W += U V^T on the CPU in one pass over W, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>
#include <optional>
#include <vector>

#include "fingerprint.h"
#include "isa.h"
#include "lowrank.h"

namespace knowedit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 96;  // rows a thread takes at a time
// A strip runs along whole rows: few streams, which the processor prefetches by itself, past panels of V that come from
// L2.
constexpr int64_t kStrip = 6;
constexpr int64_t kSpan = 16 * kUpdateWidth;  // columns a kernel call takes: what it leaves for the probe stays in L2
constexpr int64_t kWorthSharing = int64_t{1} << 25;  // multiply-adds: about a millisecond

WeightType type_of(const Tensor& w) {
  switch (w.scalar_type()) {
    case ScalarType::BFloat16: return WeightType::kBF16;
    case ScalarType::Half: return WeightType::kF16;
    case ScalarType::Float: return WeightType::kF32;
    default: STD_TORCH_CHECK(false, "w must be bfloat16, float16 or float32"); return WeightType::kF32;
  }
}

const LowRankKernels& kernels(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "this machine lacks instruction set ", isa);
#if defined(__x86_64__)
  if (isa >= kAvx512) return kLowRankAvx512;
  if (isa == kAvx2) return kLowRankAvx2;
#endif
  return kLowRankGeneric;
}

// Memory of any content that begins where a vector may.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlignment}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr size_t kAlignment = 64;
  T* data_;
};

bool is_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
         (t.stride(1) == 1 || columns <= 1 || rows == 0);  // an empty one is contiguous whatever its strides
}

bool finite(const Tensor& x) {
  const uint32_t* bits = static_cast<const uint32_t*>(x.const_data_ptr());
  uint32_t carried = 0;  // out of an exponent of ones alone
  for (int64_t i = 0, count = x.numel(); i < count; ++i) carried |= (bits[i] & 0x7f800000u) + 0x00800000u;
  return carried >> 31 == 0;
}

void update(Tensor w, Tensor base, Tensor u, Tensor v, int64_t rounding, int64_t seed, int64_t stream,
            std::optional<Tensor> plane, std::optional<Tensor> probe, bool write, Tensor sums,
            std::optional<Tensor> error, std::optional<Tensor> prints, std::optional<Tensor> lane_keys, int64_t isa) {
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
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && stream >= 0 &&
                      sums.numel() >= (stream + 1) * kSums,
                  "sums must be contiguous float64 [weights, 5]");
  STD_TORCH_CHECK(prints.has_value() == lane_keys.has_value() &&
                      (!prints || (write && prints->scalar_type() == ScalarType::Long && prints->is_contiguous() &&
                                   prints->numel() >= (stream + 1) * 2)),
                  "prints must be contiguous int64 [weights, 2], of what is written");
  STD_TORCH_CHECK(!lane_keys || (lane_keys->scalar_type() == ScalarType::Long && lane_keys->is_contiguous() &&
                                 lane_keys->numel() * 8 >= columns * size),
                  "their keys must be contiguous int64, one for every eight bytes of a row");
  STD_TORCH_CHECK(finite(u) && finite(v), "u or v contains NaN or infinity");

  const LowRankKernels& kernel = kernels(isa);
  const int64_t panels = (columns + kUpdateWidth - 1) / kUpdateWidth, blocks = (rows + kBlock - 1) / kBlock;
  // One item at a time, so that nobody waits for a slow core; a little work is not worth waking the others for.
  const auto share = [](int64_t count, int64_t steps, auto&& work) {
    if (steps < kWorthSharing) {
      for (int64_t item = 0; item < count; ++item) work(item);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), count), 1, [&](int64_t, int64_t) {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
    });
  };
  const auto pack = [&](const Tensor& x, int64_t width, float* out) {
    const float* from = static_cast<const float*>(x.const_data_ptr());
    share(panels, columns * width * 4, [&](int64_t p) {
      const int64_t column = p * kUpdateWidth;
      kernel.pack(from + column * width, width, std::min(kUpdateWidth, columns - column), size == 2, out + column * width);
    });
  };
  const Scratch<float> right(panels * kUpdateWidth * rank), seen(panels * kUpdateWidth * keys);
  pack(v, rank, right.get());
  if (keys) pack(*probe, keys, seen.get());
  // asked once: through the stable ABI each answer is a call, and a strip is a tenth of a microsecond
  char *to = static_cast<char*>(write ? w.mutable_data_ptr() : nullptr), *rest = nullptr;
  const char* from = static_cast<const char*>(base.const_data_ptr());
  const float* left = static_cast<const float*>(u.const_data_ptr());
  float* out = keys ? static_cast<float*>(error->mutable_data_ptr()) : nullptr;
  if (plane) rest = static_cast<char*>(plane->mutable_data_ptr());
  const int64_t to_stride = w.stride(0) * size, from_stride = base.stride(0) * size;
  const int64_t rest_stride = plane ? plane->stride(0) * 2 : 0;
  Scratch<double> partial(blocks * kSums * kSumLanes);
  const RowSums sum_rows = row_sums();  // while the strip is in cache
  const uint64_t* lanes_at = prints ? static_cast<const uint64_t*>(lane_keys->const_data_ptr()) : nullptr;
  std::atomic<uint64_t> print[2] = {0, 0};  // mod 2^64, in any order
  share(blocks, rows * columns * (rank + keys + 16), [&](int64_t block) {
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    double* sums_here = &partial[block * kSums * kSumLanes];
    std::fill_n(sums_here, kSums * kSumLanes, 0.0);
    const Scratch<float> lanes(kStrip * keys * kernel.lanes), e(keys ? kStrip * kSpan : 0);
    const Scratch<char> dry(write ? 0 : kStrip * kSpan * size);  // written in place of W
    uint64_t print_here[2] = {0, 0};
    for (int64_t r = block * kBlock, count; r < end; r += count) {
      count = std::min(kStrip, end - r);
      uint64_t row[2 * kStrip] = {};
      std::fill_n(lanes.get(), count * keys * kernel.lanes, 0.0f);
      for (int64_t column = 0; column < columns; column += kSpan) {
        const int64_t width = std::min(kSpan, columns - column);
        kernel.update[static_cast<int>(type)](
            {left + r * rank, &right[column * rank], rank,
             write ? to + r * to_stride + column * size : dry.get(), from + r * from_stride + column * size,
             rest ? rest + r * rest_stride + column * 2 : nullptr, write ? to_stride : kSpan * size, from_stride,
             rest_stride, count, width, r, column, static_cast<Rounding>(rounding), write,
             static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), keys ? e.get() : nullptr, kSpan},
            sums_here);
        if (keys)
          kernel.see(e.get(), kSpan, count, &seen[column * keys], (width + kUpdateWidth - 1) / kUpdateWidth, keys,
                     lanes.get());
        if (prints)
          sum_rows(to + r * to_stride + column * size, to_stride, count, lanes_at + column * size / 8, width * size,
                   row);
      }
      if (prints) add_rows(row, r, count, print_here);
      for (int64_t i = 0; i < count * keys; ++i)
        out[r * keys + i] = std::accumulate(&lanes[i * kernel.lanes], &lanes[(i + 1) * kernel.lanes], 0.0f);
    }
    for (int i = 0; i < 2; ++i) print[i].fetch_add(print_here[i], std::memory_order_relaxed);
  });
  for (int i = 0; prints && i < 2; ++i)
    static_cast<uint64_t*>(prints->mutable_data_ptr())[2 * stream + i] = print[i].load();
  double* total = static_cast<double*>(sums.mutable_data_ptr()) + stream * kSums;
  std::fill_n(total, kSums, 0.0);
  // in order: the same bits every time
  for (int64_t i = 0; i < blocks * kSums * kSumLanes; ++i) total[i / kSumLanes % kSums] += partial[i];
}

bool all_finite(std::vector<Tensor> tensors) {
  for (const Tensor& x : tensors) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "tensors must be contiguous float32");
    if (!finite(x)) return false;
  }
  return true;
}

}  // namespace
}  // namespace knowedit

// the schema is in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) {
  m.impl("low_rank_cpu_", TORCH_BOX(&knowedit::update));
  m.impl("all_finite_cpu", TORCH_BOX(&knowedit::all_finite));
}
