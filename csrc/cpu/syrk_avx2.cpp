// x86 with AVX2 and FMA: 4 x 16 outputs in eight registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "syrk.h"

KNOWEDIT_TARGET_BEGIN("avx2,fma")
namespace knowedit {
namespace {
#include "syrk_kernels.h"

struct Vector {
  using Packed = float;
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static void fold(double* sum, Reg x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), low));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), high));
  }
};

}  // namespace

const SyrkKernels kSyrkAvx2{1, pack_float, tile<Vector, 4, 2, 1>, audit};

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
