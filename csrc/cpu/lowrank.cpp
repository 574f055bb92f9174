// W += U V^T on the CPU in one pass over W, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <vector>

#include "fingerprint.h"
#include "isa.h"
#include "lowrank.h"
#include "memory.h"
#include "workspace.h"

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

WeightType type_of(ScalarType dtype) {
  switch (dtype) {
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

// Memory of any content that begins where a vector may; none for nothing.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count ? static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlignment})) : nullptr) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr size_t kAlignment = 64;
  T* data_;
};

// The update of one weight in raw memory; strides in bytes. What is optional is null.
struct Update {
  WeightType type{};
  int64_t rows = 0, columns = 0, rank = 0;
  char* w = nullptr;           // null: not written
  const char* base = nullptr;  // read instead of w
  int64_t w_stride = 0, base_stride = 0;
  const float *u = nullptr, *v = nullptr;  // contiguous
  Rounding rounding = Rounding::kNearest;
  uint64_t seed = 0;
  uint32_t stream = 0;
  char* plane = nullptr;  // bfloat16
  int64_t plane_stride = 0;
  double* sums = nullptr;        // [kSums]: nothing is measured without
  const float* probe = nullptr;  // [columns, keys], contiguous
  float* error = nullptr;        // [rows, keys], contiguous
  int64_t keys = 0;
  uint64_t* print = nullptr;  // [2]
  const uint64_t* lane_keys = nullptr;
};

// One item at a time, so that nobody waits for a slow core; a little work is not worth waking the others for.
template <class Work>
void share(int64_t count, int64_t steps, const Work& work) {
  if (steps < kWorthSharing) {
    for (int64_t item = 0; item < count; ++item) work(item);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
  });
}

// The panels of x [columns, width], in the order of weights of `size` bytes; false if x is not finite.
bool pack(const LowRankKernels& kernel, const float* x, int64_t columns, int64_t width, int64_t size, float* out) {
  std::atomic<bool> finite{true};
  share((columns + kUpdateWidth - 1) / kUpdateWidth, columns * width * 4, [&](int64_t p) {
    const int64_t column = p * kUpdateWidth, count = std::min(kUpdateWidth, columns - column);
    const float* from = x + column * width;
    if (!kernel.finite(from, count * width)) finite = false;  // and then it is in cache
    kernel.pack(from, width, count, size == 2, out + column * width);
  });
  return finite;
}

// False, and nothing written, if u or v contains NaN or infinity.
bool run(const Update& job, const LowRankKernels& kernel) {
  const int64_t rows = job.rows, columns = job.columns, rank = job.rank, keys = job.keys;
  const int64_t size = job.type == WeightType::kF32 ? 4 : 2;
  const int64_t padded = (columns + kUpdateWidth - 1) / kUpdateWidth * kUpdateWidth;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  const bool write = job.w != nullptr;
  float* const right = reinterpret_cast<float*>(workspace.at_least(padded * (rank + keys) * sizeof(float)));
  float* const seen = right + padded * rank;
  if (!kernel.finite(job.u, rows * rank) || !pack(kernel, job.v, columns, rank, size, right)) return false;
  if (keys) pack(kernel, job.probe, columns, keys, size, seen);
  const UpdateKernel update_strip = (job.sums ? kernel.measured : kernel.plain)[static_cast<int>(job.type)];
  const Scratch<double> partial(job.sums ? blocks * kSums * kSumLanes : 0);
  const RowSums sum_rows = job.print ? row_sums() : nullptr;  // while the strip is in cache
  std::atomic<uint64_t> print[2] = {0, 0};  // mod 2^64, in any order
  share(blocks, rows * columns * (rank + keys + 16), [&](int64_t block) {
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    double* sums_here = job.sums ? &partial[block * kSums * kSumLanes] : nullptr;
    if (sums_here) std::fill_n(sums_here, kSums * kSumLanes, 0.0);
    const Scratch<float> lanes(kStrip * keys * kernel.lanes), e(keys ? kStrip * kSpan : 0);
    const Scratch<char> dry(write ? 0 : kStrip * kSpan * size);  // written in place of W
    uint64_t print_here[2] = {0, 0};
    for (int64_t r = block * kBlock, count; r < end; r += count) {
      count = std::min(kStrip, end - r);
      uint64_t row[2 * kStrip] = {};
      std::fill_n(lanes.get(), count * keys * kernel.lanes, 0.0f);
      for (int64_t column = 0; column < columns; column += kSpan) {
        const int64_t width = std::min(kSpan, columns - column);
        char* const to = write ? job.w + r * job.w_stride + column * size : dry.get();
        update_strip(
            {job.u + r * rank, &right[column * rank], rank, to, job.base + r * job.base_stride + column * size,
             job.plane ? job.plane + r * job.plane_stride + column * 2 : nullptr, write ? job.w_stride : kSpan * size,
             job.base_stride, job.plane_stride, count, width, r, column, job.rounding, write, job.seed, job.stream,
             keys ? e.get() : nullptr, kSpan},
            sums_here);
        if (keys)
          kernel.see(e.get(), kSpan, count, &seen[column * keys], (width + kUpdateWidth - 1) / kUpdateWidth, keys,
                     lanes.get());
        if (job.print) sum_rows(to, job.w_stride, count, job.lane_keys + column * size / 8, width * size, row);
      }
      if (job.print) add_rows(row, r, count, print_here);
      for (int64_t i = 0; i < count * keys; ++i)
        job.error[r * keys + i] = std::accumulate(&lanes[i * kernel.lanes], &lanes[(i + 1) * kernel.lanes], 0.0f);
    }
    for (int i = 0; i < 2; ++i) print[i].fetch_add(print_here[i], std::memory_order_relaxed);
  });
  for (int i = 0; job.print && i < 2; ++i) job.print[i] = print[i].load();
  if (!job.sums) return true;
  std::fill_n(job.sums, kSums, 0.0);
  // in order: the same bits every time
  for (int64_t i = 0; i < blocks * kSums * kSumLanes; ++i) job.sums[i / kSumLanes % kSums] += partial[i];
  return true;
}

bool is_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
         (t.stride(1) == 1 || columns <= 1 || rows == 0);  // an empty one is contiguous whatever its strides
}

bool is_factor(const Tensor& t, int64_t rows, int64_t rank) {
  return is_matrix(t, ScalarType::Float, rows, rank) && t.is_contiguous();
}

void update(Tensor w, Tensor base, Tensor u, Tensor v, int64_t rounding, int64_t seed, int64_t stream,
            std::optional<Tensor> plane, std::optional<Tensor> probe, bool write, std::optional<Tensor> sums,
            std::optional<Tensor> error, std::optional<Tensor> prints, std::optional<Tensor> lane_keys, int64_t isa) {
  const int64_t rows = w.size(0), columns = w.size(1), rank = u.size(1), size = w.element_size();
  const int64_t keys = probe ? probe->size(1) : 0;
  const WeightType type = type_of(w.scalar_type());
  STD_TORCH_CHECK(is_matrix(w, w.scalar_type(), rows, columns) && is_matrix(base, w.scalar_type(), rows, columns),
                  "w and base must be alike, with dense rows");
  STD_TORCH_CHECK(is_factor(u, rows, rank) && is_factor(v, columns, rank),
                  "u and v must be contiguous float32 [rows, rank] and [columns, rank]");
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2 && (rounding == 2) == plane.has_value(), "bad rounding");
  STD_TORCH_CHECK(!plane || is_matrix(*plane, ScalarType::BFloat16, rows, columns), "the residual must be bfloat16");
  STD_TORCH_CHECK(probe.has_value() == error.has_value() &&
                      (!probe || (is_factor(*probe, columns, keys) && is_factor(*error, rows, keys))),
                  "probe and error must be contiguous float32 [columns, keys] and [rows, keys]");
  STD_TORCH_CHECK(sums || (write && !probe), "nothing is measured without sums");
  STD_TORCH_CHECK(!sums || (sums->scalar_type() == ScalarType::Double && sums->is_contiguous() && stream >= 0 &&
                            sums->numel() >= (stream + 1) * kSums),
                  "sums must be contiguous float64 [weights, 5]");
  STD_TORCH_CHECK(prints.has_value() == lane_keys.has_value() &&
                      (!prints || (write && prints->scalar_type() == ScalarType::Long && prints->is_contiguous() &&
                                   stream >= 0 && prints->numel() >= (stream + 1) * 2)),
                  "prints must be contiguous int64 [weights, 2], of what is written");
  STD_TORCH_CHECK(!lane_keys || (lane_keys->scalar_type() == ScalarType::Long && lane_keys->is_contiguous() &&
                                 lane_keys->numel() * 8 >= columns * size),
                  "their keys must be contiguous int64, one for every eight bytes of a row");
  Update job{type, rows, columns, rank, write ? written<char>(w) : nullptr, numbers<char>(base), w.stride(0) * size,
             base.stride(0) * size, numbers<float>(u), numbers<float>(v)};
  job.rounding = static_cast<Rounding>(rounding), job.seed = static_cast<uint64_t>(seed);
  job.stream = static_cast<uint32_t>(stream);
  if (plane) job.plane = written<char>(*plane), job.plane_stride = plane->stride(0) * 2;
  if (keys) job.probe = numbers<float>(*probe), job.error = written<float>(*error), job.keys = keys;
  if (sums) job.sums = written<double>(*sums) + stream * kSums;
  if (prints) job.print = written<uint64_t>(*prints) + 2 * stream, job.lane_keys = numbers<uint64_t>(*lane_keys);
  STD_TORCH_CHECK(run(job, kernels(isa)), "u or v contains NaN or infinity");
}

std::optional<WeightType> type_of_code(int32_t dtype) {
  static const int32_t bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  static const int32_t f32 = aoti_torch_dtype_float32();
  if (dtype == f32) return WeightType::kF32;
  if (dtype == bf16) return WeightType::kBF16;
  if (dtype == f16) return WeightType::kF16;
  return std::nullopt;
}

// A tensor of two dimensions whose rows are dense, read once: through the stable ABI each answer is a call.
struct Matrix {
  std::optional<WeightType> type;
  int64_t rows, columns, stride;
  void* data;

  static std::optional<Matrix> of(AtenTensorHandle t) {
    int64_t dim, *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
    if (dim != 2) return std::nullopt;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
    if (strides[1] != 1 && sizes[1] > 1 && sizes[0] > 0) return std::nullopt;
    int32_t dtype;
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &data));
    if (!data && sizes[0] && sizes[1]) return std::nullopt;  // its storage was freed
    return Matrix{type_of_code(dtype), sizes[0], sizes[1], sizes[0] > 1 ? strides[0] : sizes[1], data};
  }
  bool is_factor(int64_t count, int64_t rank) const {
    return type == WeightType::kF32 && rows == count && columns == rank && (stride == columns || count * rank == 0);
  }
  int64_t reach(int64_t size) const { return rows && columns ? ((rows - 1) * stride + columns) * size : 0; }  // bytes
};

// Whether two pieces of memory have a byte in common.
bool meet(const void* one, int64_t bytes, const void* other, int64_t others) {
  const char *begin = static_cast<const char*>(one), *start = static_cast<const char*>(other);
  return begin < start + others && start < begin + bytes;
}

// W += U V^T by the best kernel, the rest as `job` says. False, and nothing written, for all that is out of the
// ordinary: the caller then goes the long way, which can do more, or says what is wrong. To look at the arguments here
// takes a tenth of what it does in Python.
bool add_(AtenTensorHandle w, AtenTensorHandle u, AtenTensorHandle v, AtenTensorHandle residual, Update job) {
  const std::optional<Matrix> weight = Matrix::of(w), left = Matrix::of(u), right = Matrix::of(v);
  if (!weight || !left || !right || !weight->type) return false;
  const int64_t rows = weight->rows, columns = weight->columns, rank = left->columns;
  const bool single = weight->type == WeightType::kF32;
  const int64_t size = single ? 4 : 2, reach = weight->reach(size);
  if ((single && job.rounding != Rounding::kNearest) || weight->stride < columns || !left->is_factor(rows, rank) ||
      !right->is_factor(columns, rank) || (residual != nullptr) != (job.rounding == Rounding::kCompensated))
    return false;
  const auto apart = [&](const void* written, int64_t bytes) {
    return !meet(written, bytes, left->data, rows * rank * 4) && !meet(written, bytes, right->data, columns * rank * 4);
  };
  if (!apart(weight->data, reach)) return false;
  if (residual) {
    const std::optional<Matrix> plane = Matrix::of(residual);
    if (!plane || plane->type != WeightType::kBF16 || plane->rows != rows || plane->columns != columns ||
        plane->stride < columns || !apart(plane->data, plane->reach(2)) ||
        meet(weight->data, reach, plane->data, plane->reach(2)))
      return false;
    job.plane = static_cast<char*>(plane->data), job.plane_stride = plane->stride * 2;
  }
  if (const char* forced = std::getenv("KNOWEDIT_IMPL"); forced && *forced) return false;  // see _dispatch.py
  job.type = *weight->type;
  job.rows = rows, job.columns = columns, job.rank = rank;
  job.base = job.w = static_cast<char*>(weight->data);
  job.base_stride = job.w_stride = weight->stride * size;
  job.u = static_cast<float*>(left->data), job.v = static_cast<float*>(right->data);
  static const LowRankKernels& best = kernels(best_isa());
  return run(job, best);
}

// As TORCH_BOX boxes them, w, u, v -> bool, but without memory of its own for each: a tenth of a microsecond.
void add(StableIValue* stack, uint64_t, uint64_t) {
  struct Free {
    void operator()(AtenTensorOpaque* t) const { aoti_torch_delete_tensor_object(t); }
  };
  using Owner = std::unique_ptr<AtenTensorOpaque, Free>;
  using torch::stable::detail::to;
  const Owner w(to<AtenTensorHandle>(stack[0])), u(to<AtenTensorHandle>(stack[1])), v(to<AtenTensorHandle>(stack[2]));
  stack[0] = torch::stable::detail::from(add_(w.get(), u.get(), v.get(), nullptr, Update{}));
}

bool add_as(Tensor w, Tensor u, Tensor v, int64_t rounding, int64_t seed, std::optional<Tensor> residual,
            std::optional<Tensor> sums) {
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2, "bad rounding");
  STD_TORCH_CHECK(
      !sums || (sums->scalar_type() == ScalarType::Double && sums->is_contiguous() && sums->numel() == kSums),
      "sums must be contiguous float64 [5]");
  Update job;
  job.rounding = static_cast<Rounding>(rounding), job.seed = static_cast<uint64_t>(seed);
  if (sums) job.sums = written<double>(*sums);
  return add_(w.get(), u.get(), v.get(), residual ? residual->get() : nullptr, job);
}

bool all_finite(std::vector<Tensor> tensors) {
  for (const Tensor& x : tensors) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "tensors must be contiguous float32");
    if (!kernels(best_isa()).finite(numbers<float>(x), x.numel())) return false;
  }
  return true;
}

}  // namespace
}  // namespace knowedit

// the schema is in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) {
  m.impl("low_rank_cpu_", TORCH_BOX(&knowedit::update));
  m.impl("low_rank_add_cpu_", &knowedit::add);
  m.impl("low_rank_add_as_cpu_", TORCH_BOX(&knowedit::add_as));
  m.impl("all_finite_cpu", TORCH_BOX(&knowedit::all_finite));
}
