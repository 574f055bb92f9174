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
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(8 * KNOWEDIT_LANES)));
constexpr int64_t kLanes = KNOWEDIT_LANES, kVectors = kUpdateWidth / kLanes;

#define KNOWEDIT_INLINE static inline __attribute__((always_inline))

KNOWEDIT_INLINE U32 bits_of(F32 x) { return (U32)x; }
// plus: one more in every lane whose condition (-1 or 0) holds
#ifdef KNOWEDIT_AVX512  // left to the compiler, it takes three or four instructions
KNOWEDIT_INLINE I32 plus(I32 count, I32 condition) { return condition ? count + 1 : count; }
#else
KNOWEDIT_INLINE I32 plus(I32 count, I32 condition) { return count - condition; }
#endif
KNOWEDIT_INLINE I32 finite(F32 x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// `bytes` of a vector, zeros behind them
template <class V>
KNOWEDIT_INLINE V load(const void* p, int64_t bytes = sizeof(V)) {
  V v = {};
  if (bytes >= int64_t(sizeof(V))) std::memcpy(&v, p, sizeof(V));
  else std::memcpy(&v, p, bytes);
  return v;
}
template <class V>
KNOWEDIT_INLINE void store(void* p, V v, int64_t bytes = sizeof(V)) {
  if (bytes >= int64_t(sizeof(V))) std::memcpy(p, &v, sizeof(V));
  else std::memcpy(p, &v, bytes);
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

// Two vectors of weights at a time. Of a 16-bit type they are the even and the odd columns, the halves of one vector of
// 32-bit words: widening and narrowing are then a shift and a mask, and nothing crosses lanes (V's columns come in that
// order, `place_of` in lowrank.cpp). Rounding gives 32 bits a lane, from which the type takes its own.
struct BF16 {
  static constexpr int64_t size = 2;
  KNOWEDIT_INLINE void take(const char* p, int64_t bytes, F32& even, F32& odd) {
    const U32 words = load<U32>(p, bytes);
    even = (F32)(words << 16), odd = (F32)(words & 0xffff0000u);
  }
  KNOWEDIT_INLINE void put(char* p, U32 even, U32 odd, int64_t bytes) {
    store(p, even >> 16 | (odd & 0xffff0000u), bytes);
  }
  KNOWEDIT_INLINE F32 value(U32 rounded) { return (F32)(rounded & 0xffff0000u); }
  // A NaN that comes out of arithmetic has zeros in the low half, and stays one.
  KNOWEDIT_INLINE U32 nearest(F32 x) { return bits_of(x) + 0x7fffu + (bits_of(x) >> 16 & 1u); }
  KNOWEDIT_INLINE U32 stochastic(F32 x, U32 random) { return finite(x) ? bits_of(x) + random : bits_of(x); }
};

struct F16 {
  static constexpr int64_t size = 2;
  KNOWEDIT_INLINE void take(const char* p, int64_t bytes, F32& even, F32& odd) {
    const U32 words = load<U32>(p, bytes);
    even = value(words & 0xffffu), odd = value(words >> 16);
  }
  KNOWEDIT_INLINE void put(char* p, U32 even, U32 odd, int64_t bytes) { store(p, even | odd << 16, bytes); }
  KNOWEDIT_INLINE F32 value(U32 x) {
    // the multiplication rebiases the exponent and normalises subnormals; infinity and NaN keep their exponent
    const U32 magnitude = (x & 0x7fffu) << 13;
    const U32 bits = (x & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bits_of((F32)magnitude * 0x1p112f);
    return (F32)(bits | (x & 0x8000u) << 16);
  }
  KNOWEDIT_INLINE U32 nearest(F32 x) {
    const U32 sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
    const U32 normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const U32 small = bits_of((F32)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has a last place of 2^-24
    U32 rounded = magnitude < 0x38800000u ? small : normal;
    rounded = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : rounded;  // 65520 and more
    rounded = magnitude > 0x7f800000u ? U32{} + 0x7e00u : rounded;
    return rounded | sign >> 16;
  }
  KNOWEDIT_INLINE U32 stochastic(F32 x, U32 random) {
    I32 exponent = (I32)(bits_of(x) >> 23 & 0xffu) - 127;
    exponent = exponent < -14 ? I32{} - 14 : exponent;
    const I32 large = exponent > 15;  // overflows, or is not finite
    const F32 safe = (F32)(large ? I32{} : (I32)x);
    exponent = large ? I32{} : exponent;
    const F32 place = (F32)((exponent + 117) << 23), inverse = (F32)((137 - exponent) << 23);
    const F32 scaled = safe * inverse + __builtin_convertvector((I32)(random >> 3), F32) * 0x1p-13f;
    F32 whole = __builtin_convertvector(__builtin_convertvector(scaled, I32), F32);
    whole -= whole > scaled ? F32{} + 1.0f : F32{};
    return nearest(large ? x : whole * place);
  }
};

struct Plain {
  static constexpr int64_t size = 4;
  KNOWEDIT_INLINE void take(const char* p, int64_t bytes, F32& first, F32& second) {
    constexpr int64_t half = sizeof(F32);
    first = load<F32>(p, bytes), second = bytes > half ? load<F32>(p + half, bytes - half) : F32{};
  }
  KNOWEDIT_INLINE void put(char* p, U32 first, U32 second, int64_t bytes) {
    constexpr int64_t half = sizeof(U32);
    store(p, first, bytes);
    if (bytes > half) store(p + half, second, bytes - half);
  }
  KNOWEDIT_INLINE F32 value(U32 rounded) { return (F32)rounded; }
  KNOWEDIT_INLINE U32 nearest(F32 x) { return bits_of(x); }
  KNOWEDIT_INLINE U32 stochastic(F32 x, U32) { return bits_of(x); }
};

struct Tally {
  F32 ideal2 = {}, applied2 = {}, error2 = {};
  I32 changed = {};
};

// sums[lane] += x[lane] in float64
KNOWEDIT_INLINE void add_lanes(F32 x, double* sums) {
  F64 total;
  std::memcpy(&total, sums, sizeof(total));
  total += __builtin_convertvector(x, F64);
  std::memcpy(sums, &total, sizeof(total));
}

KNOWEDIT_INLINE bool all_finite(F32 x) {
  const I32 fine = finite(x);
  int32_t all = -1;
  for (int64_t i = 0; i < kLanes; ++i) all &= fine[i];
  return all != 0;
}

// Counts a strip's entries that are infinite or NaN, lane by lane: what was so before an update is so after it.
template <class T>
__attribute__((noinline, cold)) I32 count_broken(const char* w, int64_t stride, int64_t rows, int64_t columns) {
  I32 broken = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = 0; at < columns; at += 2 * kLanes) {
      F32 one, other;
      T::take(w + r * stride + at * T::size, (columns - at) * T::size, one, other);
      broken = plus(plus(broken, finite(one) == 0), finite(other) == 0);
    }
  return broken;
}

// Adds the product to a strip, rounds, stores and measures. R is s.rounding, FULL that no column is missing, SEEN that
// the errors take the product's place, K the rank where the product is made on the way (0: it has been): known when
// compiled, they leave a short loop.
template <class T, Rounding R, bool FULL, bool SEEN, int K>
KNOWEDIT_INLINE void finish_strip(const UpdateStrip& s, float* product, double* sums) {
  alignas(64) uint16_t random[kUpdateWidth];
  alignas(64) char dry[kStrip * kUpdateWidth * T::size];  // written in place of W
  char* const w = s.write ? s.w : dry;
  const int64_t w_stride = s.write ? s.w_stride : kUpdateWidth * T::size;
  Tally t;
  for (int64_t r = 0; r < s.rows; ++r) {
    if (R == Rounding::kStochastic)
      philox(s.seed, s.column / 8, s.row + r, s.stream, reinterpret_cast<uint32_t*>(random));
    char *to = w + r * w_stride, *rest = s.plane + r * s.plane_stride;
    const char* from = s.base + r * s.base_stride;
    float* mine = product + r * kUpdateWidth;
    F32 left[K ? K : 1];
    for (int k = 0; k < K; ++k) left[k] = F32{} + s.a[k * kStrip + r];
    for (int64_t at = 0; at < (FULL ? kUpdateWidth : s.columns); at += 2 * kLanes) {
      const int64_t count = FULL ? 2 * kLanes : s.columns - at;
      F32 old[2], carried[2] = {};
      U32 rounded[2], lost[2], bits[2] = {};
      T::take(from + at * T::size, count * T::size, old[0], old[1]);
      if (R == Rounding::kCompensated) BF16::take(rest + at * 2, count * 2, carried[0], carried[1]);
      if (R == Rounding::kStochastic) {
        const U32 words = load<U32>(random + at);
        bits[0] = words & 0xffffu, bits[1] = words >> 16;
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        float* const here = mine + at + i * kLanes;
        F32 ideal = {};
        if (K == 0) ideal = load<F32>(here);
        for (int k = 0; k < K; ++k) ideal += left[k] * load<F32>(s.b + k * kUpdateWidth + at + i * kLanes);
        F32 exact = old[i] + ideal;
        if (R == Rounding::kCompensated) exact += carried[i];
        rounded[i] = R == Rounding::kStochastic ? T::stochastic(exact, bits[i]) : T::nearest(exact);
        const F32 fresh = T::value(rounded[i]), applied = fresh - old[i], error = applied - ideal;
        if (R == Rounding::kCompensated) lost[i] = BF16::nearest(exact - fresh);
        if (SEEN) store(here, error);
        t.ideal2 += ideal * ideal;
        t.applied2 += applied * applied;
        t.error2 += error * error;
        t.changed = plus(t.changed, applied != 0.0f);
      }
      T::put(to + at * T::size, rounded[0], rounded[1], count * T::size);
      if (R == Rounding::kCompensated && s.write) BF16::put(rest + at * 2, lost[0], lost[1], count * 2);
    }
  }
  const I32 broken = all_finite(t.applied2) ? I32{} : count_broken<T>(w, w_stride, s.rows, s.columns);
  const F32 parts[kSums] = {t.ideal2, t.applied2, t.error2, __builtin_convertvector(t.changed, F32),
                            __builtin_convertvector(broken, F32)};  // counts this small are exact
  for (int64_t i = 0; i < kSums; ++i) add_lanes(parts[i], sums + i * kSumLanes);
}

template <class T, Rounding R, int K = 0>
KNOWEDIT_INLINE void finish(const UpdateStrip& s, float* product, double* sums) {
  if (K == 0 && s.columns != kUpdateWidth) finish_strip<T, R, false, true, 0>(s, product, sums);
  else if (s.error) finish_strip<T, R, true, true, K>(s, product, sums);
  else finish_strip<T, R, true, false, K>(s, product, sums);
}

// NV vectors at a time: as many rows of accumulators as the registers hold.
template <class T, int NV>
void update_strip(const UpdateStrip& strip, double* sums) {
  alignas(64) float own[kStrip * kUpdateWidth];
  float* product = strip.error ? strip.error : own;
  const UpdateStrip s = strip;  // a copy of its own, which stores to W cannot alias
#ifdef KNOWEDIT_DIRECT  // two loads less
  if (s.rank == 1 && s.rounding == Rounding::kNearest && s.columns == kUpdateWidth)
    return finish<T, Rounding::kNearest, 1>(s, product, sums);
#endif
  for (int64_t v0 = 0; v0 < kVectors; v0 += NV) {
    F32 acc[kStrip][NV] = {};
    const float *a = s.a, *b = s.b + v0 * kLanes;
    for (int64_t k = 0; k < s.rank; ++k, a += kStrip, b += kUpdateWidth) {
      F32 right[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) right[v] = load<F32>(b + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] += a[r] * right[v];
    }
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(product + r * kUpdateWidth + (v0 + v) * kLanes, acc[r][v]);
  }
  // Through memory: unrolled around the accumulators, finishing took 40 KB of code and spilled.
  switch (s.rounding) {
    case Rounding::kNearest: return finish<T, Rounding::kNearest>(s, product, sums);
    case Rounding::kStochastic: return finish<T, Rounding::kStochastic>(s, product, sums);
    case Rounding::kCompensated: return finish<T, Rounding::kCompensated>(s, product, sums);
  }
}

// lanes[K] += e[kUpdateWidth] probe[K][kUpdateWidth], lane by lane
template <int K>
KNOWEDIT_INLINE void see_keys(const float* e, const float* probe, float* lanes) {
  F32 acc[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) acc[k] = load<F32>(lanes + k * kLanes);
  for (int64_t at = 0; at < kUpdateWidth; at += kLanes) {
    const F32 here = load<F32>(e + at);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) acc[k] += here * load<F32>(probe + k * kUpdateWidth + at);
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) store(lanes + k * kLanes, acc[k]);
}

// lanes[rows, keys, kLanes] += e[rows, kUpdateWidth] probe[keys, kUpdateWidth]^T, whose sums over the lanes are wanted
void see_strip(const float* e, int64_t rows, const float* probe, int64_t keys, float* lanes) {
  for (int64_t r = 0; r < rows; ++r, e += kUpdateWidth) {
    int64_t k = 0;
    for (; k + 8 <= keys; k += 8, lanes += 8 * kLanes) see_keys<8>(e, probe + k * kUpdateWidth, lanes);
    for (; k + 2 <= keys; k += 2, lanes += 2 * kLanes) see_keys<2>(e, probe + k * kUpdateWidth, lanes);
    for (; k < keys; ++k, lanes += kLanes) see_keys<1>(e, probe + k * kUpdateWidth, lanes);
  }
}
