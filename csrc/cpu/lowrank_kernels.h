// The update of one strip, written once with the compiler's vectors and compiled once per instruction set.
// Included inside KNOWEDIT_TARGET_BEGIN/END and an anonymous namespace; no include may follow here.

// Vectors of the registers' width: what is wider goes through memory, at a third of the speed.
#ifdef KNOWEDIT_AVX512
#define KNOWEDIT_LANES 16
#define KNOWEDIT_CHAINS 2
#else
#define KNOWEDIT_LANES 8
#define KNOWEDIT_CHAINS 1
#endif
typedef float F32 __attribute__((vector_size(4 * KNOWEDIT_LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * KNOWEDIT_LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * KNOWEDIT_LANES)));
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(8 * KNOWEDIT_LANES)));
constexpr int64_t kChains = KNOWEDIT_CHAINS;  // of additions into a sum, side by side: as the registers allow
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

// Keeps a vector in a register: left to itself, the compiler reads it again for each of its uses, and the loads, one a
// cycle, take longer than the products.
#ifdef KNOWEDIT_REGISTERS
#define KNOWEDIT_KEEP(x) asm("" : KNOWEDIT_REGISTERS(x))
#else
#define KNOWEDIT_KEEP(x)
#endif

// numbers of a and b at these places
#if defined(__clang__)
#define KNOWEDIT_SHUFFLE(V, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KNOWEDIT_SHUFFLE(V, a, b, ...) \
  __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(sizeof(V))))){__VA_ARGS__})
#endif

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

KNOWEDIT_INLINE void add(const Tally& x, Tally& to) {
  to.ideal2 += x.ideal2, to.applied2 += x.applied2, to.error2 += x.error2, to.changed += x.changed;
}

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

// Adds the product to two vectors of weights, rounds, stores and measures; `count` of their columns are there.
template <class T, Rounding R>
KNOWEDIT_INLINE void finish(const F32 (&ideal)[2], const char* from, char* to, char* rest, const uint16_t* random,
                            float* error, int64_t count, bool write, Tally (&tallies)[kChains]) {
  F32 old[2], carried[2] = {}, off[2];
  U32 rounded[2], lost[2], bits[2] = {};
  T::take(from, count * T::size, old[0], old[1]);
  KNOWEDIT_KEEP(old[0]);
  KNOWEDIT_KEEP(old[1]);
  if (R == Rounding::kCompensated) BF16::take(rest, count * 2, carried[0], carried[1]);
  if (R == Rounding::kStochastic) {
    const U32 words = load<U32>(random);
    bits[0] = words & 0xffffu, bits[1] = words >> 16;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    Tally& t = tallies[i % kChains];
    F32 exact = old[i] + ideal[i];
    if (R == Rounding::kCompensated) exact += carried[i];
    rounded[i] = R == Rounding::kStochastic ? T::stochastic(exact, bits[i]) : T::nearest(exact);
    const F32 fresh = T::value(rounded[i]), applied = fresh - old[i];
    off[i] = applied - ideal[i];
    if (R == Rounding::kCompensated) lost[i] = BF16::nearest(exact - fresh);
    t.ideal2 += ideal[i] * ideal[i];
    t.applied2 += applied * applied;
    t.error2 += off[i] * off[i];
    t.changed = plus(t.changed, applied != 0.0f);
  }
  T::put(to, rounded[0], rounded[1], count * T::size);
  if (R == Rounding::kCompensated && write) BF16::put(rest, lost[0], lost[1], count * 2);
  if (error) store(error, off[0]), store(error + kLanes, off[1]);
}

// Rows first .. first + G - 1 of a strip, as far as there are, in the columns from `at` of one panel of V: `FULL`, all
// of the panel's, known when compiled. The product is made NV vectors at a time, in registers.
template <class T, Rounding R, int G, int NV, bool FULL>
KNOWEDIT_INLINE void update_rows(const UpdateStrip& s, int64_t first, int64_t at, Tally (&t)[kChains]) {
  const float* left[G];
  alignas(64) uint16_t random[G][kUpdateWidth];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    left[g] = s.u + std::min(first + g, s.rows - 1) * s.rank;  // the last one again, and for nothing
    if (R == Rounding::kStochastic)
      philox(s.seed, (s.column + at) / 8, s.row + first + g, s.stream, reinterpret_cast<uint32_t*>(random[g]));
  }
#pragma GCC unroll 1
  for (int64_t v0 = 0; v0 < kVectors; v0 += NV) {
    const float* b = s.v + at * s.rank + v0 * kLanes;
    F32 acc[G][NV] = {};
    for (int64_t k = 0; k < s.rank; ++k, b += kUpdateWidth) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        F32 right = load<F32>(b + v * kLanes);
        KNOWEDIT_KEEP(right);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[g][v] += left[g][k] * right;
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const int64_t r = first + g;
      if (r >= s.rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 2) {
        const int64_t column = at + (v0 + v) * kLanes, count = FULL ? 2 * kLanes : s.columns - column;
        float* const error = s.error ? s.error + r * s.error_stride + column : nullptr;
        const F32 ideal[2] = {acc[g][v], acc[g][v + 1]};
        if (count > 0)
          finish<T, R>(ideal, s.base + r * s.base_stride + column * T::size, s.w + r * s.w_stride + column * T::size,
                       s.plane + r * s.plane_stride + column * 2, random[g] + (v0 + v) * kLanes, error,
                       std::min(count, 2 * kLanes), s.write, t);
        else if (error) store(error, F32{}), store(error + kLanes, F32{});
      }
    }
  }
}

template <class T, Rounding R, int G, int NV>
void update_columns(const UpdateStrip& strip, double* sums) {
  const UpdateStrip s = strip;  // a copy of its own, which stores to W cannot alias
  Tally tallies[kChains];
  int64_t at = 0;
  for (; at + kUpdateWidth <= s.columns; at += kUpdateWidth)
    for (int64_t r = 0; r < s.rows; r += G) update_rows<T, R, G, NV, true>(s, r, at, tallies);
  for (int64_t r = 0; at < s.columns && r < s.rows; ++r) update_rows<T, R, 1, 2, false>(s, r, at, tallies);
  Tally t = tallies[0];
  for (int64_t i = 1; i < kChains; ++i) add(tallies[i], t);
  const I32 broken = all_finite(t.applied2) ? I32{} : count_broken<T>(s.w, s.w_stride, s.rows, s.columns);
  const F32 parts[kSums] = {t.ideal2, t.applied2, t.error2, __builtin_convertvector(t.changed, F32),
                            __builtin_convertvector(broken, F32)};  // counts this small are exact
  for (int64_t i = 0; i < kSums; ++i) add_lanes(parts[i], sums + i * kSumLanes);
}

// G rows and NV vectors at a time: as many accumulators as the products in flight, and registers left to finish in.
template <class T, int G, int NV>
void update_strip(const UpdateStrip& s, double* sums) {
  switch (s.rounding) {
    case Rounding::kNearest: return update_columns<T, Rounding::kNearest, G, NV>(s, sums);
    case Rounding::kStochastic: return update_columns<T, Rounding::kStochastic, G, NV>(s, sums);
    case Rounding::kCompensated: return update_columns<T, Rounding::kCompensated, G, NV>(s, sums);
  }
}

// lanes[G][keys][kLanes] += e[G][panels * kUpdateWidth] probe[panels][keys][kUpdateWidth]^T of K keys, lane by lane
template <int G, int K>
KNOWEDIT_INLINE void see_keys(const float* e, int64_t stride, const float* probe, int64_t panels, int64_t keys,
                              float* lanes) {
  F32 acc[G][K];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) acc[g][k] = load<F32>(lanes + (g * keys + k) * kLanes);
  for (int64_t p = 0; p < panels; ++p, e += kUpdateWidth, probe += keys * kUpdateWidth)
#pragma GCC unroll 1
    for (int64_t at = 0; at < kUpdateWidth; at += kLanes) {
      F32 here[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) here[g] = load<F32>(e + g * stride + at);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        F32 key = load<F32>(probe + k * kUpdateWidth + at);
        if (G > 1) KNOWEDIT_KEEP(key);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[g][k] += here[g] * key;
      }
    }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) store(lanes + (g * keys + k) * kLanes, acc[g][k]);
}

template <int G, int K>
KNOWEDIT_INLINE void see_rows(const float* e, int64_t stride, const float* probe, int64_t panels, int64_t keys,
                              float* lanes) {
  int64_t k = 0;
  for (; k + K <= keys; k += K)
    see_keys<G, K>(e, stride, probe + k * kUpdateWidth, panels, keys, lanes + k * kLanes);
  for (; k < keys; ++k) see_keys<G, 1>(e, stride, probe + k * kUpdateWidth, panels, keys, lanes + k * kLanes);
}

// See `Probe`. K keys at a time.
template <int K>
void see_strip(const float* e, int64_t stride, int64_t rows, const float* probe, int64_t panels, int64_t keys,
               float* lanes) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) see_rows<3, K>(e + r * stride, stride, probe, panels, keys, lanes + r * keys * kLanes);
  for (; r < rows; ++r) see_rows<1, K>(e + r * stride, stride, probe, panels, keys, lanes + r * keys * kLanes);
}

// Column i of x [count, rank] as row i of a panel [rank, kUpdateWidth], zeros behind the last; `halves`: in the order of
// 16-bit weights, the even ones of 2 * kLanes first, then the odd.
void pack_panel(const float* x, int64_t rank, int64_t count, bool halves, float* out) {
  typedef float Row __attribute__((vector_size(32)));
  for (int64_t place = 0; place < kUpdateWidth; place += 8) {
    const float* from[8];
    bool all = true;
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t in = (place + i) % (2 * kLanes), start = place + i - in;
      const int64_t column = halves ? start + in % kLanes * 2 + in / kLanes : place + i;
      from[i] = column < count ? x + column * rank : nullptr;
      all = all && from[i];
    }
    int64_t k = 0;
    for (; all && k + 8 <= rank; k += 8) {
      Row a[8], b[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) a[i] = load<Row>(from[i] + k);
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        b[i] = KNOWEDIT_SHUFFLE(Row, a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = KNOWEDIT_SHUFFLE(Row, a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 1 + (i % 2) * 2) {
        a[i] = KNOWEDIT_SHUFFLE(Row, b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        a[i + 2] = KNOWEDIT_SHUFFLE(Row, b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(out + (k + i) * kUpdateWidth + place, KNOWEDIT_SHUFFLE(Row, a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store(out + (k + i + 4) * kUpdateWidth + place, KNOWEDIT_SHUFFLE(Row, a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
      }
    }
    for (; k < rank; ++k)
      for (int64_t i = 0; i < 8; ++i) out[k * kUpdateWidth + place + i] = from[i] ? from[i][k] : 0.0f;
  }
}
