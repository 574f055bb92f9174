// The update of one strip, written once with the compiler's vectors and compiled once per instruction set.
// Included inside KNOWEDIT_TARGET_BEGIN/END and an anonymous namespace; no other include may follow here.

#include "lowrank_vectors.h"

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

// Adds the product to two vectors of weights, rounds, stores and, for M, measures; `count` of their columns are there.
template <class T, Rounding R, bool M>
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
    F32 exact = old[i] + ideal[i];
    if (R == Rounding::kCompensated) exact += carried[i];
    rounded[i] = R == Rounding::kStochastic ? T::stochastic(exact, bits[i]) : T::nearest(exact);
    const F32 fresh = T::value(rounded[i]);
    if (R == Rounding::kCompensated) lost[i] = BF16::nearest(exact - fresh);
    if constexpr (!M) continue;
    Tally& t = tallies[i % kChains];
    const F32 applied = fresh - old[i];
    off[i] = applied - ideal[i];
    t.ideal2 += ideal[i] * ideal[i];
    t.applied2 += applied * applied;
    t.error2 += off[i] * off[i];
    t.changed = plus(t.changed, applied != 0.0f);
  }
  T::put(to, rounded[0], rounded[1], count * T::size);
  if (R == Rounding::kCompensated && write) BF16::put(rest, lost[0], lost[1], count * 2);
  if (M && error) store(error, off[0]), store(error + kLanes, off[1]);
}

// Rows first .. first + G - 1 of a strip in the columns from `at` of one panel of V: `FULL`, all of the panel's, known
// when compiled. The product is made NV vectors at a time, in registers.
template <class T, Rounding R, bool M, int G, int NV, bool FULL>
KNOWEDIT_INLINE void update_rows(const UpdateStrip& s, int64_t first, int64_t at, Tally (&t)[kChains]) {
  const float* left[G];
  const char* from[G];
  char *to[G], *rest[G];
  alignas(64) uint16_t random[G][kUpdateWidth];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    const int64_t r = first + g;
    left[g] = s.u + r * s.rank;
    from[g] = s.base + r * s.base_stride + at * T::size;
    to[g] = s.w + r * s.w_stride + at * T::size;
    rest[g] = R == Rounding::kCompensated ? s.plane + r * s.plane_stride + at * 2 : nullptr;
    KNOWEDIT_HERE(left[g]);
    KNOWEDIT_HERE(from[g]);
    KNOWEDIT_HERE(to[g]);
    if (R == Rounding::kStochastic)
      philox(s.seed, (s.column + at) / 8, s.row + r, s.stream, reinterpret_cast<uint32_t*>(random[g]));
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
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 2) {
        const int64_t in = (v0 + v) * kLanes, count = FULL ? 2 * kLanes : s.columns - at - in;
        float* const error = M && s.error ? s.error + (first + g) * s.error_stride + at + in : nullptr;
        const F32 ideal[2] = {acc[g][v], acc[g][v + 1]};
        if (count > 0)
          finish<T, R, M>(ideal, from[g] + in * T::size, to[g] + in * T::size, rest[g] + in * 2, random[g] + in, error,
                          std::min(count, 2 * kLanes), s.write, t);
        else if (error) store(error, F32{}), store(error + kLanes, F32{});
      }
    }
  }
}

template <class T, Rounding R, bool M, int G, int NV>
void update_columns(const UpdateStrip& strip, double* sums) {
  const UpdateStrip s = strip;  // a copy of its own, which stores to W cannot alias
  Tally tallies[kChains];
  int64_t at = 0;
  for (; at + kUpdateWidth <= s.columns; at += kUpdateWidth) {
    int64_t r = 0;
    for (; r + G <= s.rows; r += G) update_rows<T, R, M, G, NV, true>(s, r, at, tallies);
    for (; r < s.rows; ++r) update_rows<T, R, M, 1, NV, true>(s, r, at, tallies);
  }
  for (int64_t r = 0; at < s.columns && r < s.rows; ++r) update_rows<T, R, M, 1, 2, false>(s, r, at, tallies);
  if constexpr (!M) return;
  Tally t = tallies[0];
  for (int64_t i = 1; i < kChains; ++i) add(tallies[i], t);
  const I32 broken = all_finite(t.applied2) ? I32{} : count_broken<T>(s.w, s.w_stride, s.rows, s.columns);
  const F32 parts[kSums] = {t.ideal2, t.applied2, t.error2, __builtin_convertvector(t.changed, F32),
                            __builtin_convertvector(broken, F32)};  // counts this small are exact
  for (int64_t i = 0; i < kSums; ++i) add_lanes(parts[i], sums + i * kSumLanes);
}

// G rows and NV vectors at a time: as many accumulators as the products in flight, and registers left to finish in.
template <class T, bool M, int G, int NV>
void update_strip(const UpdateStrip& s, double* sums) {
  switch (s.rounding) {
    case Rounding::kNearest: return update_columns<T, Rounding::kNearest, M, G, NV>(s, sums);
    case Rounding::kStochastic: return update_columns<T, Rounding::kStochastic, M, G, NV>(s, sums);
    case Rounding::kCompensated: return update_columns<T, Rounding::kCompensated, M, G, NV>(s, sums);
  }
}
