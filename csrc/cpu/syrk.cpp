// C += K^T K on the CPU (lower triangle, float64 C), of all keys or of groups of them, registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "isa.h"
#include "keys.h"
#include "memory.h"
#include "syrk.h"
#include "workspace.h"

namespace knowedit {
namespace {

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
  double* out = written<double>(c);
  add_segments<double>(keys, kernel, segments, [&](int64_t, int64_t i) { return out + i * ldc; });
}

template <class T>
void grouped(Tensor& c, const Tensor& keys, const SyrkKernels& kernel, const std::vector<Segment>& segments) {
  const int64_t d = keys.size(1), size = d * (d + 1) / 2;
  T* out = written<T>(c);
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
  const int64_t* start = numbers<int64_t>(offsets);
  const int64_t* index = order ? numbers<int64_t>(*order) : nullptr;
  STD_TORCH_CHECK(start[0] == 0 && start[groups] == tokens, "offsets must run from 0 to the number of rows");
  for (int64_t t = 0; index && t < tokens; ++t)
    STD_TORCH_CHECK(index[t] >= 0 && index[t] < tokens, "row ", index[t], " is not among the keys");
  if (tokens == 0 || d == 0) return;
  const Rows rows{keys.stride(0), 0, index, weights ? numbers<float>(*weights) : nullptr};
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

}  // namespace
}  // namespace knowedit

extern "C" __attribute__((visibility("default"))) int knowedit_cpu_isa() { return knowedit::best_isa(); }

// the schemas are in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) {
  m.impl("syrk_cpu_", TORCH_BOX(&knowedit::syrk));
  m.impl("grouped_syrk_cpu_", TORCH_BOX(&knowedit::grouped_syrk));
}
