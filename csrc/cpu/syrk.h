// The second moment on the CPU: what the driver (syrk.cpp) needs from an instruction set's kernels (syrk_*.cpp).
#pragma once
#include <cstdint>

namespace knowedit {

constexpr int64_t kPanel = 32;   // columns of a packed panel
constexpr int64_t kTile = 128;   // rows and columns of a tile of C: 128 KiB of float64, which stays in L2
constexpr int64_t kProbes = 4;   // random sign vectors of the audit

enum class Type : int { kF32, kF16, kBF16 };

// Which rows of the keys are summed, and by what they are multiplied first (in float32).
struct Rows {
  int64_t stride;        // elements from one row of the keys to the next
  int64_t first;         // of the order, or of the keys themselves
  const int64_t* order;  // row numbers, or null: as they lie
  const float* weights;  // of the rows as they lie, or null: 1
  int64_t at(int64_t t) const { return order ? order[first + t] : first + t; }
  float weight(int64_t t) const { return weights ? weights[at(t)] : 1.0f; }
};

struct SyrkKernels {
  int64_t tokens_per_step;  // 1, or 2 where one instruction multiplies pairs; a step is 32 x 4 bytes in a panel
  // x: the keys of `type` from the panel's first column on, of which `columns` exist; out:
  // [ceil(tokens / tokens_per_step), kPanel], zero-padded. Pairs take no weights.
  void (*pack)(const void* x, Type type, const Rows& rows, int64_t tokens, int64_t columns, void* out);
  // sum[kTile, kTile] += a^T b over `steps`; a and b hold four panels each, `stride` bytes apart. With
  // `diagonal`, what lies above it is not computed. `a_panels` and `b_panels` (<= 4) exist.
  void (*tile)(const char* a, const char* b, int64_t stride, int64_t a_panels, int64_t b_panels, int64_t steps,
               bool diagonal, double* sum);
  // out[0] += sum of squares of the row x [d]; out[1 + p] += (x . signs[p])^2; signs: [kProbes, d]
  void (*audit)(const void* x, Type type, int64_t d, const double* signs, double* out);
};

extern const SyrkKernels kSyrkGeneric;
#if defined(__x86_64__)
extern const SyrkKernels kSyrkAvx2, kSyrkAvx512, kSyrkAvx512Bf16;
#endif

}  // namespace knowedit
