// W += U V^T on the CPU: what the driver (lowrank.cpp) needs from an instruction set's kernels (lowrank_*.cpp).
#pragma once
#include <cstdint>

namespace knowedit {

constexpr int64_t kStrip = 6;        // rows of W a kernel call updates
constexpr int64_t kUpdateWidth = 64; // columns of W a kernel call updates: four vectors of sixteen, or eight of eight
constexpr int64_t kSums = 5;         // ideal^2, applied^2, (applied - ideal)^2, changed, not finite
constexpr int64_t kSumLanes = 16;    // columns apart by this many, or half of it, share a partial sum

enum class Rounding : int { kNearest, kStochastic, kCompensated };
enum class WeightType : int { kBF16, kF16, kF32 };

struct UpdateStrip {
  const float* a;  // [rank, kStrip] of U, zero-padded
  const float* b;  // [rank, kUpdateWidth] of V, zero-padded
  int64_t rank;
  char* w;           // [rows, columns]; row strides in bytes
  const char* base;  // read instead of w
  char* plane;       // bfloat16, or null
  int64_t w_stride, base_stride, plane_stride;
  int64_t rows, columns;    // at most kStrip, kUpdateWidth
  int64_t row, column;      // position in W, for the random bits
  Rounding rounding;
  bool write;
  uint64_t seed;
  uint32_t stream;
  float* error;  // [kStrip, kUpdateWidth] receives applied - ideal (zero beside the strip), or null
};

// Updates one strip and adds to sums[kSums][kSumLanes]; indexed by WeightType.
using UpdateKernel = void (*)(const UpdateStrip&, double* sums);

// What a strip's errors e [rows, kUpdateWidth] add to the output at probe keys, [keys, kUpdateWidth] zero-padded:
// sums [rows, keys, `lanes`], whose sums over the last axis are wanted.
struct Probe {
  void (*see)(const float* e, int64_t rows, const float* probe, int64_t keys, float* sums);
  int64_t lanes;
};

extern const Probe kProbeGeneric;
extern const UpdateKernel kUpdateGeneric[3];
#if defined(__x86_64__)
extern const Probe kProbeAvx2, kProbeAvx512;
extern const UpdateKernel kUpdateAvx2[3], kUpdateAvx512[3];
#endif

}  // namespace knowedit
