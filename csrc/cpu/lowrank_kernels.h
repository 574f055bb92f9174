// The update of one strip, written once with the compiler's vectors and compiled once per instruction set.
// Included inside KNOWEDIT_TARGET_BEGIN/END and an anonymous namespace; no include may follow here.

// Vectors of the registers' width: what is wider goes through memory, at a third of the speed.
#ifdef KNOWEDIT_AVX512
#define KNOWEDIT_LANES 16
#else
#define KNOWEDIT_LANES 8
#endif
typedef float F32 __attribute__((vector_size(4 * KNOWEDIT_LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * KNOWEDIT_LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * KNOWEDIT_LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * KNOWEDIT_LANES)));
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(8 * KNOWEDIT_LANES)));
constexpr int64_t kLanes = KNOWEDIT_LANES, kVectors = kUpdateWidth / kLanes;

#define KNOWEDIT_INLINE static inline __attribute__((always_inline))

KNOWEDIT_INLINE U32 bits_of(F32 x) { return (U32)x; }
// plus: one more in every lane whose condition (-1 or 0) holds
#ifdef KNOWEDIT_AVX512  // left to the compiler, each takes three or four instructions
KNOWEDIT_INLINE I32 plus(I32 count, I32 condition) { return condition ? count + 1 : count; }
KNOWEDIT_INLINE U32 wide(U16 x) { return (U32)_mm512_cvtepu16_epi32((__m256i)x); }
KNOWEDIT_INLINE U16 narrow(U32 x) { return (U16)_mm512_cvtepi32_epi16((__m512i)x); }
#else
KNOWEDIT_INLINE I32 plus(I32 count, I32 condition) { return count - condition; }
KNOWEDIT_INLINE U32 wide(U16 x) { return __builtin_convertvector(x, U32); }
KNOWEDIT_INLINE U16 narrow(U32 x) { return __builtin_convertvector(x, U16); }
#endif
KNOWEDIT_INLINE I32 finite(F32 x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

template <class V>
KNOWEDIT_INLINE V load(const void* p, int64_t count) {
  V v = {};
  if (count >= kLanes) std::memcpy(&v, p, sizeof(V));
  else std::memcpy(&v, p, count * (sizeof(V) / kLanes));
  return v;
}
template <class V>
KNOWEDIT_INLINE void store(void* p, V v, int64_t count) {
  if (count >= kLanes) std::memcpy(p, &v, sizeof(V));
  else std::memcpy(p, &v, count * (sizeof(V) / kLanes));
}

// Seven rounds of Philox 4x32 at counters (group .. group + 7, row, stream, 0): as lowrank/rounding.py.
// words[4 g + i]: read as 16-bit halves they are the bits of eight neighbouring columns.
KNOWEDIT_INLINE void philox(uint64_t seed, int64_t group, int64_t row, uint32_t stream, uint32_t* words) {
  const U64 low = U64{} + 0xffffffffu;
  U64 c0 = (U64{0, 1, 2, 3, 4, 5, 6, 7} + uint64_t(group)) & low, c1 = U64{} + uint32_t(row), c2 = U64{} + stream;
  U64 c3 = U64{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const U64 a = c0 * 0xD2511F53u, b = c2 * 0xCD9E8D57u;
    c0 = (b >> 32) ^ c1 ^ uint64_t(k0);
    c1 = b & low;
    c2 = (a >> 32) ^ c3 ^ uint64_t(k1);
    c3 = a & low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int g = 0; g < 8; ++g) {
    words[4 * g] = uint32_t(c0[g]);
    words[4 * g + 1] = uint32_t(c1[g]);
    words[4 * g + 2] = uint32_t(c2[g]);
    words[4 * g + 3] = uint32_t(c3[g]);
  }
}

struct BF16 {
  using Raw = U16;
  KNOWEDIT_INLINE F32 widen(U16 x) { return (F32)(wide(x) << 16); }
  KNOWEDIT_INLINE U16 nearest(F32 x) {
    const U32 bits = bits_of(x), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return narrow((x == x ? rounded : U32{} + 0x7fc00000u) >> 16);
  }
  KNOWEDIT_INLINE U16 stochastic(F32 x, U16 random) {
    const U16 rounded = narrow((bits_of(x) + wide(random)) >> 16);
    return __builtin_convertvector(finite(x), U16) ? rounded : nearest(x);
  }
};

struct F16 {
  using Raw = U16;
  KNOWEDIT_INLINE F32 widen(U16 x) {
    // the multiplication rebiases the exponent and normalises subnormals; infinity and NaN keep their exponent
    const U32 magnitude = wide(x & 0x7fff) << 13;
    const U32 bits = (wide(x) & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bits_of((F32)magnitude * 0x1p112f);
    return (F32)(bits | wide(x & 0x8000) << 16);
  }
  KNOWEDIT_INLINE U16 nearest(F32 x) {
    const U32 sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
    const U32 normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const U32 small = bits_of((F32)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has a last place of 2^-24
    U32 rounded = magnitude < 0x38800000u ? small : normal;
    rounded = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : rounded;  // 65520 and more
    rounded = magnitude > 0x7f800000u ? U32{} + 0x7e00u : rounded;
    return narrow(rounded | sign >> 16);
  }
  KNOWEDIT_INLINE U16 stochastic(F32 x, U16 random) {
    I32 exponent = (I32)(bits_of(x) >> 23 & 0xffu) - 127;
    exponent = exponent < -14 ? I32{} - 14 : exponent;
    const I32 large = exponent > 15;  // overflows, or is not finite
    const F32 safe = (F32)(large ? I32{} : (I32)x);
    exponent = large ? I32{} : exponent;
    const F32 place = (F32)((exponent + 117) << 23), inverse = (F32)((137 - exponent) << 23);
    const F32 scaled = safe * inverse + __builtin_convertvector((I32)(wide(random) >> 3), F32) * 0x1p-13f;
    F32 whole = __builtin_convertvector(__builtin_convertvector(scaled, I32), F32);
    whole -= whole > scaled ? F32{} + 1.0f : F32{};
    return nearest(large ? x : whole * place);
  }
};

struct Plain {
  using Raw = F32;
  KNOWEDIT_INLINE F32 widen(F32 x) { return x; }
  KNOWEDIT_INLINE F32 nearest(F32 x) { return x; }
  KNOWEDIT_INLINE F32 stochastic(F32 x, U16) { return x; }
};

struct Tally {
  F32 ideal2 = {}, applied2 = {}, error2 = {};
  I32 changed = {}, broken = {};
};

// sums[lane] += x[lane] in float64
KNOWEDIT_INLINE void add_lanes(F32 x, double* sums) {
  F64 total;
  std::memcpy(&total, sums, sizeof(total));
  total += __builtin_convertvector(x, F64);
  std::memcpy(sums, &total, sizeof(total));
}

// Adds the product to a strip, rounds, stores and measures. R is s.rounding, FULL that no column is missing: known when
// compiled, they leave a short loop.
template <class T, Rounding R, bool FULL>
KNOWEDIT_INLINE void finish_strip(const UpdateStrip& s, const float* product, double* sums) {
  using Raw = typename T::Raw;
  constexpr int64_t size = sizeof(Raw) / kLanes;
  alignas(64) uint16_t random[kUpdateWidth];
  Tally t;
  for (int64_t r = 0; r < s.rows; ++r) {
    if (R == Rounding::kStochastic)
      philox(s.seed, s.column / 8, s.row + r, s.stream, reinterpret_cast<uint32_t*>(random));
    for (int64_t at = 0; at < (FULL ? kUpdateWidth : s.columns); at += kLanes) {
      const int64_t count = FULL ? kLanes : s.columns - at;
      const F32 ideal = load<F32>(product + r * kUpdateWidth + at, kLanes);
      const F32 old = T::widen(load<Raw>(s.base + r * s.base_stride + at * size, count));
      F32 exact = old + ideal;
      char* plane = s.plane + r * s.plane_stride + at * 2;
      if (R == Rounding::kCompensated) exact += BF16::widen(load<U16>(plane, count));
      const Raw raw = R == Rounding::kStochastic ? T::stochastic(exact, load<U16>(random + at, kLanes)) : T::nearest(exact);
      const F32 fresh = T::widen(raw), applied = fresh - old, error = applied - ideal;
      if (s.write) {
        store(s.w + r * s.w_stride + at * size, raw, count);
        if (R == Rounding::kCompensated) store(plane, BF16::nearest(exact - fresh), count);
      }
      if (s.error) store(s.error + r * kUpdateWidth + at, error, kLanes);
      t.ideal2 += ideal * ideal;
      t.applied2 += applied * applied;
      t.error2 += error * error;
      t.changed = plus(t.changed, applied != 0.0f);
      t.broken = plus(t.broken, finite(applied) == 0);
    }
  }
  const F32 parts[kSums] = {t.ideal2, t.applied2, t.error2, __builtin_convertvector(t.changed, F32),
                            __builtin_convertvector(t.broken, F32)};  // counts this small are exact
  for (int64_t i = 0; i < kSums; ++i) add_lanes(parts[i], sums + i * kSumLanes);
}

template <class T, Rounding R>
KNOWEDIT_INLINE void finish(const UpdateStrip& s, const float* product, double* sums) {
  if (s.columns == kUpdateWidth) finish_strip<T, R, true>(s, product, sums);
  else finish_strip<T, R, false>(s, product, sums);
}

// NV vectors at a time: as many rows of accumulators as the registers hold.
template <class T, int NV>
void update_strip(const UpdateStrip& strip, double* sums) {
  alignas(64) float product[kStrip * kUpdateWidth];
  const UpdateStrip s = strip;  // a copy of its own, which stores to W cannot alias
  for (int64_t v0 = 0; v0 < kVectors; v0 += NV) {
    F32 acc[kStrip][NV] = {};
    const float *a = s.a, *b = s.b + v0 * kLanes;
    for (int64_t k = 0; k < s.rank; ++k, a += kStrip, b += kUpdateWidth) {
      F32 right[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) right[v] = load<F32>(b + v * kLanes, kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] += a[r] * right[v];
    }
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(product + r * kUpdateWidth + (v0 + v) * kLanes, acc[r][v], kLanes);
  }
  // Through memory: unrolled around the accumulators, finishing took 40 KB of code and spilled.
  switch (s.rounding) {
    case Rounding::kNearest: return finish<T, Rounding::kNearest>(s, product, sums);
    case Rounding::kStochastic: return finish<T, Rounding::kStochastic>(s, product, sums);
    case Rounding::kCompensated: return finish<T, Rounding::kCompensated>(s, product, sums);
  }
}

// error[kStrip, keys] += e[kStrip, kUpdateWidth] probe[kUpdateWidth, keys], `keys` a multiple of kProbeLanes
void see_strip(const float* e, int64_t columns, const float* probe, int64_t keys, float* error) {
  constexpr int kNext = kProbeLanes / kLanes;
  for (int64_t q = 0; q < keys; q += kProbeLanes) {
    F32 acc[kStrip][kNext];
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kNext; ++v) acc[r][v] = load<F32>(error + r * keys + q + v * kLanes, kLanes);
    for (int64_t c = 0; c < columns; ++c) {
      F32 key[kNext];
#pragma GCC unroll 2
      for (int v = 0; v < kNext; ++v) key[v] = load<F32>(probe + c * keys + q + v * kLanes, kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kNext; ++v) acc[r][v] += e[r * kUpdateWidth + c] * key[v];
    }
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kNext; ++v) store(error + r * keys + q + v * kLanes, acc[r][v], kLanes);
  }
}
