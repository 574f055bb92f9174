// The AVX2 and AVX-512 instructions that csrc/cpu names, lane by lane in C++, for processors that lack them.
// Found before the compiler's own <immintrin.h>; everything else in those files is written with the compiler's vectors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef float __m128 __attribute__((vector_size(16), may_alias));
typedef double __m256d __attribute__((vector_size(32), may_alias));
typedef float __m256 __attribute__((vector_size(32), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef uint16_t __m512bh __attribute__((vector_size(64), may_alias));

namespace emulated {
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));

// A subnormal input or result of VDPBF16PS counts as zero.
inline float flushed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = bits & 0x7f800000u ? bits : bits & 0x80000000u;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}
}  // namespace emulated

inline __m256 _mm256_broadcast_ss(const float* p) { return __m256{} + *p; }
inline __m256 _mm256_loadu_ps(const void* p) { __m256 v; std::memcpy(&v, p, sizeof(v)); return v; }
inline __m256d _mm256_loadu_pd(const void* p) { __m256d v; std::memcpy(&v, p, sizeof(v)); return v; }
inline void _mm256_storeu_pd(void* p, __m256d v) { std::memcpy(p, &v, sizeof(v)); }
inline __m256d _mm256_add_pd(__m256d a, __m256d b) { return a + b; }
inline __m256d _mm256_cvtps_pd(__m128 x) { return __builtin_convertvector(x, __m256d); }
inline __m128 _mm256_extractf128_ps(__m256 x, int half) {
  __m128 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&x) + 16 * half, sizeof(out));
  return out;
}
inline __m128 _mm256_castps256_ps128(__m256 x) { return _mm256_extractf128_ps(x, 0); }
template <class V>
inline V multiply_add_lanes(V a, V b, V c) {
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); ++l) c[l] = std::fma(a[l], b[l], c[l]);
  return c;
}
inline __m256d _mm256_broadcast_sd(const double* p) { return __m256d{} + *p; }
inline void _mm256_storeu_ps(void* p, __m256 v) { std::memcpy(p, &v, sizeof(v)); }
inline __m256 _mm256_mul_ps(__m256 a, __m256 b) { return a * b; }
inline __m256d _mm256_mul_pd(__m256d a, __m256d b) { return a * b; }
inline __m256 _mm256_add_ps(__m256 a, __m256 b) { return a + b; }

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float x) { return __m512{} + x; }
inline __m512i _mm512_set1_epi32(int x) { return (__m512i)(emulated::U32x16{} + uint32_t(x)); }
inline __m512 _mm512_loadu_ps(const void* p) { __m512 v; std::memcpy(&v, p, sizeof(v)); return v; }
inline __m512d _mm512_loadu_pd(const void* p) { __m512d v; std::memcpy(&v, p, sizeof(v)); return v; }
inline __m512i _mm512_loadu_si512(const void* p) { __m512i v; std::memcpy(&v, p, sizeof(v)); return v; }
inline void _mm512_storeu_pd(void* p, __m512d v) { std::memcpy(p, &v, sizeof(v)); }
inline __m512d _mm512_add_pd(__m512d a, __m512d b) { return a + b; }
inline __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
inline __m512d _mm512_cvtps_pd(__m256 x) { return __builtin_convertvector(x, __m512d); }
inline __m256 _mm512_extractf32x8_ps(__m512 x, int half) {
  __m256 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&x) + 32 * half, sizeof(out));
  return out;
}
inline __m256 _mm512_castps512_ps256(__m512 x) { return _mm512_extractf32x8_ps(x, 0); }
inline __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
inline __m512d _mm512_set1_pd(double x) { return __m512d{} + x; }
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof(v)); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof(v)); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512d _mm512_mul_pd(__m512d a, __m512d b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return multiply_add_lanes(a, b, c); }
inline __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) { return multiply_add_lanes(a, b, c); }
inline __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  for (int l = 0; l < 16; ++l) {
    const float odd = emulated::flushed(
        __builtin_fmaf(emulated::widened(a[2 * l + 1]), emulated::widened(b[2 * l + 1]), emulated::flushed(c[l])));
    c[l] = emulated::flushed(__builtin_fmaf(emulated::widened(a[2 * l]), emulated::widened(b[2 * l]), odd));
  }
  return c;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return (__m512i)__builtin_convertvector((emulated::U16x16)x, emulated::U32x16);
}
inline __m256i _mm512_cvtepi32_epi16(__m512i x) {
  return (__m256i)__builtin_convertvector((emulated::U32x16)x, emulated::U16x16);
}
