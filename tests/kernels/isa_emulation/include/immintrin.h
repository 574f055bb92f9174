// The AVX2, AVX-512 and AMX instructions that csrc/cpu names, lane by lane in C++, for processors that lack them.
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
inline float half(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(float(exponent ? fraction | 1024 : fraction), (exponent ? exponent : 1) - 25);
  return x & 0x8000 ? -size : size;
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
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned bits) { return (__m512i)((emulated::U32x16)x << bits); }
typedef uint16_t __mmask16;
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  emulated::U16x16 v{};
  for (int l = 0; l < 16; ++l)
    if (mask >> l & 1) std::memcpy(&v[l], static_cast<const char*>(p) + 2 * l, 2);
  return (__m256i)v;
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
  const emulated::U16x16 bits = (emulated::U16x16)x;
  __m512 out;
  for (int l = 0; l < 16; ++l) out[l] = emulated::half(bits[l]);
  return out;
}
// To nearest, ties to even; a subnormal number counts as zero.
inline emulated::U16x16 _mm512_cvtneps_pbh(__m512 x) {
  emulated::U16x16 out;
  for (int l = 0; l < 16; ++l) {
    const float value = emulated::flushed(x[l]);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    out[l] = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
  }
  return out;
}
// Lanes of 128 bits: `unpack` of either half, and whole lanes chosen from a and from b.
template <class U>
inline __m512i unpacked(__m512i a, __m512i b, int half) {
  constexpr int kLane = 16 / sizeof(U);
  U x[4 * kLane], y[4 * kLane], out[4 * kLane];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
  for (int l = 0; l < 4 * kLane; ++l) {
    const int from = l / kLane * kLane + half * kLane / 2 + l % kLane / 2;
    out[l] = l % 2 ? y[from] : x[from];
  }
  std::memcpy(&a, out, 64);
  return a;
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked<uint32_t>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked<uint32_t>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked<uint64_t>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked<uint64_t>(a, b, 1); }
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int lanes) {
  __m512i out;
  for (int l = 0; l < 4; ++l)
    std::memcpy(reinterpret_cast<char*>(&out) + 16 * l,
                reinterpret_cast<const char*>(l < 2 ? &a : &b) + 16 * (lanes >> 2 * l & 3), 16);
  return out;
}

// Tile registers, of 16 rows of 64 bytes.
namespace emulated {
inline thread_local float tiles[8][16][16];
inline thread_local bool configured = false;  // an unconfigured register is a fault
}  // namespace emulated
inline void _tile_loadconfig(const void*) { emulated::configured = true; }
inline void _tile_release() { emulated::configured = false; }
inline void _tile_zero(int t) { std::memset(emulated::tiles[t], 0, sizeof(emulated::tiles[t])); }
inline void _tile_loadd(int t, const void* from, int64_t stride) {
  if (!emulated::configured) __builtin_trap();
  for (int r = 0; r < 16; ++r) std::memcpy(emulated::tiles[t][r], static_cast<const char*>(from) + r * stride, 64);
}
inline void _tile_stored(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, emulated::tiles[t][r], 64);
}
// Two chains of 16 from zero, of the even and of the odd tokens; their sum; and that added to the output.
inline void _tile_dpbf16ps(int c, int a, int b) {
  using emulated::flushed;
  const auto key = [](int t, int row, int k) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(emulated::tiles[t][row]) + 2 * k, 2);
    return emulated::widened(bits);
  };
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum[2] = {0, 0};
      for (int k = 0; k < 16; ++k)
        for (int odd = 0; odd < 2; ++odd)
          sum[odd] = flushed(__builtin_fmaf(key(a, m, 2 * k + odd), key(b, k, 2 * n + odd), sum[odd]));
      emulated::tiles[c][m][n] = flushed(flushed(emulated::tiles[c][m][n]) + flushed(sum[0] + sum[1]));
    }
}
inline __m256i _mm512_cvtepi32_epi16(__m512i x) {
  return (__m256i)__builtin_convertvector((emulated::U32x16)x, emulated::U16x16);
}
