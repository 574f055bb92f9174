// W += U V^T on the CPU: what the driver (lowrank.cpp) needs from an instruction set's kernels (lowrank_*.cpp).
#pragma once
#include <cstdint>

namespace knowedit {

constexpr int64_t kUpdateWidth = 64;  // columns of a panel of V: four vectors of sixteen, or eight of eight
constexpr int64_t kSums = 5;         // ideal^2, applied^2, (applied - ideal)^2, changed, not finite
constexpr int64_t kSumLanes = 16;    // columns apart by this many, or half of it, share a partial sum

enum class Rounding : int { kNearest, kStochastic, kCompensated };
enum class WeightType : int { kBF16, kF16, kF32 };

struct UpdateStrip {
  const float* u;  // [rows, rank]
  const float* v;  // [panels, rank, kUpdateWidth] of V, zero-padded
  int64_t rank;
  char* w;           // [rows, columns]; row strides in bytes
  const char* base;  // read instead of w
  char* plane;       // bfloat16, or null
  int64_t w_stride, base_stride, plane_stride;
  int64_t rows, columns;  // at most kStrip, any
  int64_t row, column;    // position in W, for the random bits
  Rounding rounding;
  bool write;  // the plane, too
  uint64_t seed;
  uint32_t stream;
  float* error;  // [rows, panels * kUpdateWidth] receives applied - ideal (zero beside the strip), or null
  int64_t error_stride;
};

// Updates one strip and adds to sums[kSums][kSumLanes]; one that measures nothing knows neither them nor an error.
using UpdateKernel = void (*)(const UpdateStrip&, double* sums);

struct LowRankKernels {
  UpdateKernel plain[3], measured[3];  // indexed by WeightType
  // What a strip's errors e [rows, panels * kUpdateWidth] add to the output at probe keys, [panels, keys, kUpdateWidth]
  // zero-padded: to sums [rows, keys, `lanes`], whose sums over the last axis are wanted.
  void (*see)(const float* e, int64_t stride, int64_t rows, const float* probe, int64_t panels, int64_t keys,
              float* sums);
  // A panel of V, or of the probe, from its rows x [count, rank]; `halves` for 16-bit weights.
  void (*pack)(const float* x, int64_t rank, int64_t count, bool halves, float* panel);
  bool (*finite)(const float* x, int64_t count);
  int64_t lanes;
};

extern const LowRankKernels kLowRankGeneric;
#if defined(__x86_64__)
extern const LowRankKernels kLowRankAvx2, kLowRankAvx512;
#endif

}  // namespace knowedit
