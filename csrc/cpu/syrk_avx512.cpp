// x86 with AVX-512, for float32, and with AVX512_BF16, for bf16 (pairs of tokens).
//
// 8 x 32 outputs (float64: 8 x 16) in 16 registers: ten loads for 16 products. Where a vector is loaded for every product
// without loss (`multiplies_halves`), 12 x 16 (12 x 8) in twelve registers, which leaves twelve for the totals of the
// chains and halves what the diagonal computes in vain. The bits are the same.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "syrk.h"

KNOWEDIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace knowedit {
namespace {
constexpr int64_t kEdge = 192;  // rows and columns of a tile of C
#include "syrk_kernels.h"

struct Vector {
  using Packed = float;
  using Reg = __m512;
  static constexpr int kLanes = 16, kRegisters = 32;
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static void fold(double* sum, Reg x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), low));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), high));
  }
};

// Packed element: the same column of two tokens, the earlier one in the low half.
struct PairVector : Vector {
  using Packed = uint32_t;
  static Reg load(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static void store(uint32_t* p, Reg x) { _mm512_storeu_si512(p, _mm512_castps_si512(x)); }
  static Reg broadcast(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
  static Reg multiply(Reg a, Reg b) { return multiply_add(a, b, _mm512_setzero_ps()); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

struct DoubleVector {
  using Packed = double;
  using Reg = __m512d;
  static constexpr int kLanes = 8, kRegisters = 32;
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Reg x) { _mm512_storeu_pd(p, x); }
  static Reg broadcast(const double* p) { return _mm512_set1_pd(*p); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static void fold(double* sum, Reg x) { _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), x)); }
};

template <int64_t kPanel>
void pack_pairs(const void* x, Type, const Rows& rows, int64_t tokens, int64_t columns, const Packing& out) {
  const uint16_t* keys = static_cast<const uint16_t*>(x);
  uint32_t* o = static_cast<uint32_t*>(out.right);
  for (int64_t t = 0; t < tokens; t += 2, o += kPanel) {
    const uint16_t* row = keys + rows.at(t) * rows.stride;
    const uint16_t* next = t + 1 < tokens ? keys + rows.at(t + 1) * rows.stride : row;
    if (columns >= kPanel && t + 1 < tokens) {
      for (int64_t l = 0; l < kPanel; ++l) o[l] = row[l] | uint32_t(next[l]) << 16;
    } else {
      for (int64_t l = 0; l < kPanel; ++l)
        o[l] = l >= columns ? 0u : row[l] | (t + 1 < tokens ? uint32_t(next[l]) << 16 : 0u);
    }
  }
}

// As `kernels`, of bf16.
template <int MR, int NV, bool kShort, bool kWait>
constexpr SyrkKernels pairs() {
  constexpr int64_t kPanel = std::lcm(NV * PairVector::kLanes, MR);
  return {kPanel, 2, kPanel * 4, pack_pairs<kPanel>, tile<PairVector, MR, NV, kPanel, 2, kShort, kWait>, kAdd, kEdge};
}

}  // namespace

const SyrkKernels kSyrkAvx512[3] = {kernels<Vector, 8, 2, true, false>(), kernels<Vector, 8, 2, false, false>(),
                                    kernels<DoubleVector, 8, 2, false, false>()};
const SyrkKernels kSyrkAvx512Bf16[3] = {pairs<8, 2, true, false>(), pairs<8, 2, false, false>(), kSyrkAvx512[2]};
const SyrkKernels kSyrkHalves[3] = {kernels<Vector, 12, 1, true, true>(), kernels<Vector, 12, 1, false, true>(),
                                    kernels<DoubleVector, 12, 1, false, true>()};
const SyrkKernels kSyrkHalvesBf16[3] = {pairs<12, 1, true, true>(), pairs<12, 1, false, true>(), kSyrkHalves[2]};
const AuditKernel kAuditAvx512 = audit;

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
