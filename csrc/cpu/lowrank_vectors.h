// Vectors of floats, random bits, and 16-bit and 32-bit weights with their roundings: what the update of a strip is
// written in. Included by lowrank_kernels.h, once per instruction set; no include may follow here.

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

// Has an address computed here: left to itself, the compiler carries a dozen of them through a loop, in memory.
#define KNOWEDIT_HERE(address) asm("" : "+r"(address))

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
// order, `pack_panel` in lowrank_panels.h). Rounding gives 32 bits a lane, from which the type takes its own.
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
