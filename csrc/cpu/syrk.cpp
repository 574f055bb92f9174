// C += K^T K on the CPU (lower triangle, float64 C) and the audit of K, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
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

Type type_of(const Tensor& keys) {
  switch (keys.scalar_type()) {
    case ScalarType::Float: return Type::kF32;
    case ScalarType::Half: return Type::kF16;
    case ScalarType::BFloat16: return Type::kBF16;
    case ScalarType::Double: return Type::kF64;
    default: STD_TORCH_CHECK(false, "keys must be float64, float32, float16 or bfloat16"); return Type::kF32;
  }
}

void check_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "this machine lacks instruction set ", isa);
}

const SyrkKernels& kernels(int64_t isa, int64_t arithmetic, Type type, bool weighted = false) {
  check_isa(isa);
  STD_TORCH_CHECK(arithmetic >= 0 && arithmetic <= static_cast<int>(Arithmetic::kDouble), "unknown arithmetic ", arithmetic);
  STD_TORCH_CHECK(type != Type::kF64 || arithmetic == static_cast<int>(Arithmetic::kDouble),
                  "float64 keys need float64 arithmetic");
  // 16-bit products take no weights: these go through float32
#if defined(KNOWEDIT_AMX)
  if (isa == kAmx && !weighted && arithmetic != static_cast<int>(Arithmetic::kDouble)) {
    if (type == Type::kBF16) return kSyrkAmxBf16;
    if (type == Type::kF16) return kSyrkAmxF16;
  }
#endif
#if defined(__x86_64__)
  static const bool halves = multiplies_halves();
  if (isa == kAvx512Bf16 && type == Type::kBF16 && !weighted) return (halves ? kSyrkHalvesBf16 : kSyrkAvx512Bf16)[arithmetic];
  if (isa >= kAvx512) return (halves ? kSyrkHalves : kSyrkAvx512)[arithmetic];
  if (isa == kAvx2) return kSyrkAvx2[arithmetic];
#endif
  return kSyrkGeneric[arithmetic];
}

AuditKernel audit_kernel(int64_t isa) {
  check_isa(isa);
#if defined(__x86_64__)
  if (isa >= kAvx512) return kAuditAvx512;
  if (isa == kAvx2) return kAuditAvx2;
#endif
  return kAuditGeneric;
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

// Rows of one group that are summed together: `rows.first` says where they start.
struct Segment {
  int64_t group, count;
  Rows rows;
};

// Cuts a group's `count` rows into equal segments of at most `most`, and appends them. Two of one group are more than
// `most` together, so that no wave of `add_segments` has both.
void cut(std::vector<Segment>& segments, int64_t group, int64_t count, Rows rows, int64_t most) {
  const int64_t pieces = (count + most - 1) / most;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = count * i / pieces / 32 * 32, end = i + 1 < pieces ? count * (i + 1) / pieces / 32 * 32 : count;
    segments.push_back({group, end - begin, {rows.stride, rows.first + begin, rows.order, rows.weights}});
  }
}

// Where a thread packs keys: kept from call to call, in pages as large as can be had. Fresh ordinary ones would cost a
// twentieth of the time of d = 4096 in float64, a fault each, and more addresses than a processor keeps translated.
class Workspace {
 public:
  char* at_least(size_t bytes) {
    if (held_ < bytes) {
      constexpr size_t kPage = size_t{1} << 21;
      memory_.reset();
      held_ = (bytes + kPage - 1) / kPage * kPage;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kPage, held_)));
      if (!memory_) held_ = 0;
      STD_TORCH_CHECK(memory_, "no memory for ", bytes, " bytes of packed keys");
#if defined(__linux__)
      madvise(memory_.get(), held_, MADV_HUGEPAGE);  // advice: where there are none, ordinary pages do
#endif
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t held_ = 0;
};

thread_local Workspace workspace;

// The part of row i0 + i that a tile at (i0, j0) of a lower triangle of `d` rows has: from j0 on, so many columns.
int64_t width_of(int64_t edge, int64_t d, int64_t i0, int64_t j0, int64_t i) {
  return std::min({edge, d - j0, i0 + i - j0 + 1});
}

// Adds the lower triangle of every segment's K^T K to its group's, of which row(group, i) is the start of row i.
// Segments are taken in waves of as many rows as a block has (or one), so that what is packed stays in cache and every
// thread has work, however uneven the groups are.
template <class T, class Row>
void add_segments(const Tensor& keys, const SyrkKernels& kernel, const std::vector<Segment>& segments, const Row& row) {
  const Type type = type_of(keys);
  const int64_t d = keys.size(1), width = kernel.panel, panels = (d + width - 1) / width, edge = kernel.edge;
  const int64_t blocks = (d + edge - 1) / edge, per_block = edge / width, tiles = blocks * (blocks + 1) / 2;
  const int64_t depth = kernel.depth / kernel.tokens_per_step;
  const auto steps = [&](const Segment& segment) {
    return (segment.count + kernel.tokens_per_step - 1) / kernel.tokens_per_step;
  };
  std::vector<int64_t> start;  // of the wave's segments in `packed`, in steps
  for (size_t first = 0, last = 0; first < segments.size(); first = last) {
    start.assign(1, 0);
    for (int64_t rows = 0;
         last < segments.size() && (last == first || rows + segments[last].count <= kernel.tokens_per_block); ++last) {
      rows += segments[last].count;
      start.push_back(start.back() + steps(segments[last]));
    }
    const int64_t bytes = start.back() * panels * kernel.step_bytes;
    char* packed = workspace.at_least(bytes * (1 + kernel.two_orders));
    const int64_t left = kernel.two_orders ? bytes : 0;  // from a right operand to the same as a left one
    const int64_t count = static_cast<int64_t>(last - first);
    // A pass's panels lie side by side, whatever comes before and after: at the distance of a whole segment they would
    // compete for the same places of the cache.
    const auto length_of = [&](int64_t s, int64_t from) { return std::min(depth, start[s + 1] - start[s] - from); };
    const auto panel = [&](int64_t s, int64_t from, int64_t p) {
      return packed + ((start[s] + from) * panels + length_of(s, from) * p) * kernel.step_bytes;
    };
    // a few panels and a few rows at a time: rows are read by the cache line, and a page is visited once. As many rows as
    // a set of the cache has places: at a stride of a power of two they all compete for the same.
    const int64_t few = std::max<int64_t>(8, kernel.tokens_per_step);
    dynamic_for(count * blocks, [&](int64_t item) {
      const int64_t s = item / blocks, begin = item % blocks * per_block, end = std::min(panels, begin + per_block);
      const Segment& segment = segments[first + s];
      const int64_t size = keys.element_size(), row_bytes = keys.stride(0) * size;
      const char* const base = address(keys, 0, begin * width);
      for (int64_t t = 0; t < segment.count; t += few) {
        for (int64_t r = t + few; r < std::min(t + 2 * few, segment.count); ++r) {
          const char* const row = base + segment.rows.at(r) * row_bytes;
          for (int64_t byte = 0; byte < (std::min(end * width, d) - begin * width) * size; byte += Ahead::kLine)
            __builtin_prefetch(row + byte);
        }
        const int64_t step = t / kernel.tokens_per_step, from = step / depth * depth;
        for (int64_t p = begin; p < end; ++p) {
          char* right = panel(s, from, p) + (step - from) * kernel.step_bytes;
          kernel.pack(base + (p - begin) * width * size, type, segment.rows.from(t), std::min(few, segment.count - t),
                      std::min(width, d - p * width), {right, right + left});
        }
      }
    });
    // the last rows of tiles are the longest: first in, so that no thread ends with a long tail
    dynamic_for(count * tiles, [&](int64_t item) {
      const int64_t s = item / tiles;
      int64_t i = blocks - 1, j = item % tiles;
      for (; j > i; --i) j -= i + 1;
      const int64_t i0 = i * edge, j0 = j * edge, rows = std::min(edge, d - i0), group = segments[first + s].group;
      const int64_t all = start[s + 1] - start[s];
      char* outs[kMaxTile];
      for (int64_t r = 0; r < rows; ++r) outs[r] = reinterpret_cast<char*>(row(group, i0 + r) + j0);
      alignas(64) thread_local double sum[kMaxTile * kMaxTile];
      std::fill_n(sum, edge * edge, 0.0);
      for (int64_t from = 0; from < all; from += depth) {
        // next: the panels of the following pass, or after the last one of the tile on the right; and this one's share of C
        const int64_t end = std::min(from + depth, all), next = end % all, right = next == 0 ? std::min(j + 1, i) : j;
        const int64_t bytes = per_block * length_of(s, next) * kernel.step_bytes;
        const char *a = panel(s, next, i * per_block) + left, *b = panel(s, next, right * per_block);
        const int64_t row = rows * from / all;
        Ahead ahead{a, b, bytes, outs + row, rows * end / all - row, width_of(edge, d, i0, j0, rows - 1) * int64_t{sizeof(T)}};
        kernel.tile(panel(s, from, i * per_block) + left, panel(s, from, j * per_block), rows, std::min(edge, d - j0),
                    length_of(s, from), segments[first + s].count, i == j, sum, ahead);
      }
      for (int64_t r = 0; r < rows; ++r)
        kernel.add(reinterpret_cast<T*>(outs[r]), sum + r * edge, width_of(edge, d, i0, j0, r));
    });
  }
}

void syrk(Tensor c, Tensor keys, int64_t arithmetic, int64_t isa) {
  check_keys(keys);
  const int64_t tokens = keys.size(0), d = keys.size(1), ldc = c.stride(0);
  STD_TORCH_CHECK(c.scalar_type() == ScalarType::Double && c.dim() == 2 && c.size(0) == d && c.size(1) == d &&
                      (c.stride(1) == 1 || d <= 1),
                  "c must be float64 [d, d] with dense rows");
  if (tokens == 0 || d == 0) return;
  const SyrkKernels& kernel = kernels(isa, arithmetic, type_of(keys));
  std::vector<Segment> segments;
  cut(segments, 0, tokens, {keys.stride(0), 0, nullptr, nullptr}, kernel.tokens_per_block);
  double* out = static_cast<double*>(c.mutable_data_ptr());
  add_segments<double>(keys, kernel, segments, [&](int64_t, int64_t i) { return out + i * ldc; });
}

template <class T>
void grouped(Tensor& c, const Tensor& keys, const SyrkKernels& kernel, const std::vector<Segment>& segments) {
  const int64_t d = keys.size(1), size = d * (d + 1) / 2;
  T* out = static_cast<T*>(c.mutable_data_ptr());
  add_segments<T>(keys, kernel, segments,
                  [&](int64_t group, int64_t i) { return out + group * size + i * (i + 1) / 2; });
}

// c [groups, d (d + 1) / 2], of every group a lower triangle row by row, += the moments of the groups' rows.
void grouped_syrk(Tensor c, Tensor keys, std::optional<Tensor> order, Tensor offsets, std::optional<Tensor> weights,
                  int64_t arithmetic, int64_t isa) {
  check_keys(keys);
  const int64_t tokens = keys.size(0), d = keys.size(1), groups = c.size(0);
  const auto whole = [](const Tensor& x, int64_t n) {
    return x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() == n;
  };
  STD_TORCH_CHECK(c.is_contiguous() && c.dim() == 2 && c.size(1) == d * (d + 1) / 2, "c must be [groups, d (d + 1) / 2]");
  STD_TORCH_CHECK(whole(offsets, groups + 1), "offsets must be int64 [groups + 1]");
  STD_TORCH_CHECK(!order || whole(*order, tokens), "order must be int64 [n]");
  STD_TORCH_CHECK(!weights || (weights->scalar_type() == ScalarType::Float && weights->is_contiguous() &&
                               weights->numel() == tokens), "weights must be float32 [n]");
  const int64_t* start = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t* index = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
  STD_TORCH_CHECK(start[0] == 0 && start[groups] == tokens, "offsets must run from 0 to the number of rows");
  for (int64_t t = 0; index && t < tokens; ++t)
    STD_TORCH_CHECK(index[t] >= 0 && index[t] < tokens, "row ", index[t], " is not among the keys");
  if (tokens == 0 || d == 0) return;
  const Rows rows{keys.stride(0), 0, index, weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr};
  const SyrkKernels& kernel = kernels(isa, arithmetic, type_of(keys), weights.has_value());
  std::vector<Segment> segments;
  for (int64_t g = 0; g < groups; ++g) {
    STD_TORCH_CHECK(start[g] <= start[g + 1], "offsets must rise");
    cut(segments, g, start[g + 1] - start[g], {rows.stride, start[g], rows.order, rows.weights}, kernel.tokens_per_block);
  }
  if (c.scalar_type() == ScalarType::Double) return grouped<double>(c, keys, kernel, segments);
  STD_TORCH_CHECK(c.scalar_type() == ScalarType::Float, "c must be float64 or float32");
  grouped<float>(c, keys, kernel, segments);
}

// Every row's own audit, and a copy of it to `out` (if present) while it is in cache.
void row_audit(std::optional<Tensor> out, Tensor sums, Tensor keys, Tensor signs, int64_t isa) {
  check_keys(keys);
  const int64_t tokens = keys.size(0), d = keys.size(1), bytes = d * keys.element_size();
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Double && signs.is_contiguous() && signs.numel() == kProbes * d,
                  "signs must be contiguous float64 [4, d]");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.numel() == tokens * (1 + kProbes),
                  "sums must be contiguous float64 [n, 5]");
  STD_TORCH_CHECK(!out || (out->is_contiguous() && out->scalar_type() == keys.scalar_type() && out->numel() == tokens * d),
                  "out must be contiguous, [n, d], of the keys' dtype");
  const Type type = type_of(keys);
  const AuditKernel audit_row = audit_kernel(isa);
  const double* z = static_cast<const double*>(signs.const_data_ptr());
  double* each = static_cast<double*>(sums.mutable_data_ptr());
  char* to = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
  const int64_t chunk = 256, chunks = (tokens + chunk - 1) / chunk;
  dynamic_for(chunks, [&](int64_t i) {
    for (int64_t t = i * chunk; t < std::min(tokens, (i + 1) * chunk); ++t) {
      const char* row = address(keys, t, 0);
      if (to) std::memcpy(to + t * bytes, row, bytes);
      std::fill_n(each + t * (1 + kProbes), 1 + kProbes, 0.0);
      audit_row(row, type, d, z, each + t * (1 + kProbes));
    }
  });
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
  const AuditKernel audit_row = audit_kernel(isa);
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
      audit_row(row, type, d, z, &partial[i * (1 + kProbes)]);
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
  m.impl("grouped_syrk_cpu_", TORCH_BOX(&knowedit::grouped_syrk));
  m.impl("row_audit_cpu_", TORCH_BOX(&knowedit::row_audit));
}
