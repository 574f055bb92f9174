// The second moment on the CPU: what the driver (syrk.cpp) needs from an instruction set's kernels (syrk_*.cpp).
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

namespace knowedit {

constexpr int64_t kTile = 96;    // rows and columns of a tile of C: 72 KiB of float64, which stays in L2
constexpr int64_t kMaxTile = 192;  // of any instruction set's
constexpr int64_t kDepth = 128;  // tokens per pass over a tile: a panel of each operand then stays in L1
constexpr int64_t kProbes = 4;   // random sign vectors of the audit

enum class Type : int { kF32, kF16, kBF16, kF64 };

// How products are summed: float32 within numerics.MOMENT, float32 within MOMENT_FAST, float64. The numbers are part of
// the op schema (see _ops.py).
enum class Arithmetic : int { kExact, kFast, kDouble };

// Which rows of the keys are summed, and by what they are multiplied first.
struct Rows {
  int64_t stride;        // elements from one row of the keys to the next
  int64_t first;         // of the order, or of the keys themselves
  const int64_t* order;  // row numbers, or null: as they lie
  const float* weights;  // of the rows as they lie, or null: 1
  Rows from(int64_t t) const { return {stride, first + t, order, weights}; }
  int64_t at(int64_t t) const { return order ? order[first + t] : first + t; }
  float weight(int64_t t) const { return weights ? weights[at(t)] : 1.0f; }
};

// What will be read after a tile's sum: while that is computed, every block of registers asks for a share of it, so that
// it has come into L2 when its turn is. The processor foresees none of this: panels lie a whole pass apart, rows of C pages.
struct Ahead {
  static constexpr int64_t kLine = 64;  // bytes that a processor fetches at once
  const char *a, *b;                    // panels to be multiplied
  int64_t panel_bytes;                  // of a, and of b
  char* const* rows;                    // of C, to be written
  int64_t row_count, row_bytes;

  int64_t panel_share = 0, row_share = 0;  // how much `fetch` asks for
  int64_t panel = 0, row = 0;              // where it goes on: a byte and a row
  void divide(int64_t shares) {
    panel_share = (panel_bytes / kLine / shares + 1) * kLine;
    row_share = row_count / shares + 1;
  }
  void fetch() {
    const int64_t end = std::min(panel + panel_share, panel_bytes);
    for (int64_t byte = panel; byte < end; byte += kLine) __builtin_prefetch(a + byte, 0, 2);
    for (int64_t byte = panel; byte < end; byte += kLine) __builtin_prefetch(b + byte, 0, 2);
    panel = end;
    for (const int64_t last = std::min(row + row_share, row_count); row < last; ++row)
      for (int64_t byte = 0; byte < row_bytes; byte += kLine) __builtin_prefetch(rows[row] + byte, 1);
  }
};

// Where keys are packed to.
struct Packing {
  void* right;  // the panel as the right operand
  void* left;   // and as the left one, where that is another order
};

// out[n] += sum[n], of a row of C in either storage.
struct Adding {
  void (*wide)(double* out, const double* sum, int64_t n);
  void (*narrow)(float* out, const double* sum, int64_t n);
  void operator()(double* out, const double* sum, int64_t n) const { wide(out, sum, n); }
  void operator()(float* out, const double* sum, int64_t n) const { narrow(out, sum, n); }
};

// What an instruction set does for one arithmetic. Keys are packed into panels: `panel` columns side by side, step after
// step.
struct SyrkKernels {
  int64_t panel;            // divides `edge`
  int64_t tokens_per_step;  // 1, or more where one instruction multiplies so many
  int64_t step_bytes;       // of one step in a panel
  // x: the keys of `type` from the panel's first column on, of which `columns` exist; right, and left:
  // [ceil(tokens / tokens_per_step), panel], zero-padded. Pairs take no weights.
  void (*pack)(const void* x, Type type, const Rows& rows, int64_t tokens, int64_t columns, const Packing& out);
  // sum[edge, edge] += a^T b over `steps`, at most `depth` tokens of the `tokens` that are summed in all; a and b hold
  // panels of so many steps, one behind the other, of which the first `a_columns` and `b_columns` (<= edge) columns
  // exist. With `diagonal`, what lies above it is not computed. Meanwhile what lies `ahead` is fetched.
  void (*tile)(const char* a, const char* b, int64_t a_columns, int64_t b_columns, int64_t steps, int64_t tokens,
               bool diagonal, double* sum, Ahead& ahead);
  Adding add;
  int64_t edge = kTile;             // rows and columns of a tile of C, at most kMaxTile
  int64_t depth = kDepth;           // tokens per pass over a tile
  int64_t tokens_per_block = 1024;  // packed per pass over C: the barriers and the traffic of C vanish, panels stay in L3
  bool two_orders = false;          // left operands are packed in an order of their own
};

// Indexed by Arithmetic.
extern const SyrkKernels kSyrkGeneric[3];
#if defined(__x86_64__)
extern const SyrkKernels kSyrkAvx2[3], kSyrkAvx512[3], kSyrkAvx512Bf16[3];
extern const SyrkKernels kSyrkHalves[3], kSyrkHalvesBf16[3];  // of AVX-512 where it `multiplies_halves`
extern const SyrkKernels kSyrkAmxBf16, kSyrkAmxF16;  // exact and fast are the same
#endif

// out[0] += sum of squares of the row x [d]; out[1 + p] += (x . signs[p])^2; signs: [kProbes, d]
using AuditKernel = void (*)(const void* x, Type type, int64_t d, const double* signs, double* out);
extern const AuditKernel kAuditGeneric;
#if defined(__x86_64__)
extern const AuditKernel kAuditAvx2, kAuditAvx512;
#endif

}  // namespace knowedit
