// x86 with AVX2 and FMA: 4 x 24 outputs (float64: 4 x 12) in twelve of the sixteen registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "syrk.h"

// c += a b with all three in registers: left to choose, gcc 12 reads b from memory for every product (12 loads a step where
// there is time for 12 in all) and moves the sums about.
#ifdef KNOWEDIT_EMULATED
#define KNOWEDIT_MULTIPLY_ADD(type, a, b, c) c = multiply_add_lanes(a, b, c)
#else
#define KNOWEDIT_MULTIPLY_ADD(type, a, b, c) asm("vfmadd231" type " %2, %1, %0" : "+x"(c) : "x"(a), "x"(b))
#endif

KNOWEDIT_TARGET_BEGIN("avx2,fma")
namespace knowedit {
namespace {
constexpr int64_t kEdge = kTile;  // rows and columns of a tile of C
#include "syrk_kernels.h"

struct Vector {
  using Packed = float;
  using Reg = __m256;
  static constexpr int kLanes = 8, kRegisters = 16;
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { KNOWEDIT_MULTIPLY_ADD("ps", a, b, c); return c; }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static void fold(double* sum, Reg x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), low));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), high));
  }
};

struct DoubleVector {
  using Packed = double;
  using Reg = __m256d;
  static constexpr int kLanes = 4, kRegisters = 16;
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Reg x) { _mm256_storeu_pd(p, x); }
  static Reg broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { KNOWEDIT_MULTIPLY_ADD("pd", a, b, c); return c; }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static void fold(double* sum, Reg x) { _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), x)); }
};

}  // namespace

const SyrkKernels kSyrkAvx2[3] = {kernels<Vector, 4, 3, true, true>(), kernels<Vector, 4, 3, false, true>(),
                                  kernels<DoubleVector, 4, 3, false, true>()};
const AuditKernel kAuditAvx2 = audit;

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
