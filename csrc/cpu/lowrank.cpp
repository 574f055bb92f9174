// W += U V^T on the CPU in one pass over W, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "isa.h"
#include "lowrank.h"

namespace knowedit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 16 * kStrip;  // rows a thread takes at a time
// Up to this rank a strip runs along whole rows, as few streams as the processor prefetches by itself, and V comes from
// L2. Above it a panel of V stays in L1 and serves a block's rows, whose next columns are asked for by hand.
constexpr int64_t kStreamedRank = 16;
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

Probe probing(int64_t isa) {
#if defined(__x86_64__)
  if (isa >= kAvx512) return kProbeAvx512;
  if (isa == kAvx2) return kProbeAvx2;
#endif
  return kProbeGeneric;
}

bool is_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
         (t.stride(1) == 1 || columns <= 1);
}

// Where a panel has a column: of 16-bit weights the even ones of 2 * lanes first, then the odd (lowrank_kernels.h).
std::array<int64_t, kUpdateWidth> place_of(int64_t size, int64_t lanes) {
  std::array<int64_t, kUpdateWidth> place;
  for (int64_t i = 0; i < kUpdateWidth; ++i) {
    const int64_t in = i % (2 * lanes);
    place[i] = size == 2 ? i - in + in % 2 * lanes + in / 2 : i;
  }
  return place;
}

// out [rank, width], at `place`, = x [count, rank] transposed, zero-padded to `width` columns
void pack(const float* x, int64_t rank, int64_t count, int64_t width, const int64_t* place, float* out) {
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t i = 0; i < width; ++i) out[k * width + place[i]] = i < count ? x[i * rank + k] : 0.0f;
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
  std::vector<float> seen(panels * keys * kUpdateWidth);  // the probe, as V
  // asked once: through the stable ABI each answer is a call, and a strip is a tenth of a microsecond
  char *to = static_cast<char*>(write ? w.mutable_data_ptr() : nullptr), *rest = nullptr;
  char* from = static_cast<char*>(const_cast<void*>(base.const_data_ptr()));
  if (plane) rest = static_cast<char*>(plane->mutable_data_ptr());
  const int64_t to_stride = w.stride(0) * size, from_stride = base.stride(0) * size;
  const int64_t rest_stride = plane ? plane->stride(0) * 2 : 0;
  const Probe probes = probing(isa);
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
  const auto place = place_of(size, probes.lanes), in_order = place_of(4, probes.lanes);
  const auto pack_panels = [&](const float* x, int64_t count, float* out) {
    share(panels, columns * count * 16, [&](int64_t p) {
      pack(x + p * kUpdateWidth * count, count, std::min(kUpdateWidth, columns - p * kUpdateWidth), kUpdateWidth,
           place.data(), out + p * count * kUpdateWidth);
    });
  };
  pack_panels(pv, rank, right.data());
  if (keys) pack_panels(static_cast<const float*>(probe->const_data_ptr()), keys, seen.data());
  const int64_t together = rank <= kStreamedRank ? kStrip : kBlock;
  share(blocks, rows * columns * (rank + keys + 16), [&](int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(rows, begin + kBlock);
    std::vector<float> left(rank * together), lanes(together * keys * probes.lanes);
    alignas(64) float e[kStrip * kUpdateWidth];
    for (int64_t first = begin; first < end; first += together) {
      const int64_t last = std::min(end, first + together);
      for (int64_t r = first; r < last; r += kStrip)
        pack(pu + r * rank, rank, std::min(kStrip, last - r), kStrip, in_order.data(), &left[(r - first) * rank]);
      std::fill(lanes.begin(), lanes.end(), 0.0f);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = p * kUpdateWidth, width = std::min(kUpdateWidth, columns - column);
        const bool ask = together > kStrip && p + 1 < panels;
        for (int64_t r = first; r < last; r += kStrip) {
          const auto at = [&](char* data, int64_t stride, int64_t bytes) { return data + r * stride + column * bytes; };
          const int64_t height = std::min(kStrip, last - r);
          for (int64_t i = 0; ask && i < height; ++i)
            for (int64_t line = 0; line < kUpdateWidth * size; line += 64)
              __builtin_prefetch(at(from, from_stride, size) + i * from_stride + kUpdateWidth * size + line, 1);
          const UpdateStrip strip{
              &left[(r - first) * rank], &right[p * rank * kUpdateWidth], rank,
              write ? at(to, to_stride, size) : nullptr, at(from, from_stride, size),
              rest ? at(rest, rest_stride, 2) : nullptr, to_stride, from_stride, rest_stride,
              height, width, r, column, static_cast<Rounding>(rounding), write,
              static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), keys ? e : nullptr};
          kernel(strip, &partial[block * kSums * kSumLanes]);
          if (keys)
            probes.see(e, height, &seen[p * keys * kUpdateWidth], keys, &lanes[(r - first) * keys * probes.lanes]);
        }
      }
      float* out = keys ? static_cast<float*>(error->mutable_data_ptr()) + first * keys : nullptr;
      for (int64_t i = 0; i < (last - first) * keys; ++i)
        out[i] = std::accumulate(&lanes[i * probes.lanes], &lanes[i * probes.lanes] + probes.lanes, 0.0f);
    }
  });
  double* total = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(total, kSums, 0.0);
  // in order: the same bits every time
  for (size_t i = 0; i < partial.size(); ++i) total[i / kSumLanes % kSums] += partial[i];
}

template <class Bits>
bool all_finite(const Bits* x, int64_t count, Bits exponent, Bits one) {
  Bits carried = 0;  // out of an exponent of ones alone
  for (int64_t i = 0; i < count; ++i) carried |= (x[i] & exponent) + one;
  return !(carried & ~(~Bits{0} >> 1));
}

bool finite(std::vector<Tensor> tensors) {
  for (const Tensor& x : tensors) {
    STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
    const void* data = x.const_data_ptr();
    if (x.scalar_type() == ScalarType::Float) {
      if (!all_finite<uint32_t>(static_cast<const uint32_t*>(data), x.numel(), 0x7f800000u, 0x00800000u)) return false;
    } else {
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "tensors must be float32 or float64");
      const uint64_t exponent = 0x7ffull << 52, one = 1ull << 52;
      if (!all_finite<uint64_t>(static_cast<const uint64_t*>(data), x.numel(), exponent, one)) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace knowedit

// the schema is in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) {
  m.impl("low_rank_cpu_", TORCH_BOX(&knowedit::update));
  m.impl("all_finite_cpu", TORCH_BOX(&knowedit::finite));
}
