// Panels of V and of the probe keys, and what a strip's errors add to the output at the keys. Included behind
// lowrank_kernels.h, once per instruction set; no include may follow here.

// Where a panel has column `at`. Of 16-bit weights (`halves`) the even ones of 2 * kLanes come first, then the odd.
KNOWEDIT_INLINE int64_t place_of(int64_t at, bool halves) {
  const int64_t in = at % (2 * kLanes);
  return halves ? at - in + in / 2 + in % 2 * kLanes : at;
}

// Numbers first .. first + 7 of eight columns of V, to eight neighbouring places of a panel.
KNOWEDIT_INLINE void pack_eight(const float* const (&from)[8], int64_t first, float* out) {
  typedef float Row __attribute__((vector_size(32)));
  Row a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load<Row>(from[i] + first);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = KNOWEDIT_SHUFFLE(Row, a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = KNOWEDIT_SHUFFLE(Row, a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = KNOWEDIT_SHUFFLE(Row, b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = KNOWEDIT_SHUFFLE(Row, b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(out + (first + i) * kUpdateWidth, KNOWEDIT_SHUFFLE(Row, a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(out + (first + i + 4) * kUpdateWidth, KNOWEDIT_SHUFFLE(Row, a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

// Column i of x [count, rank] as row place_of(i) of a panel [rank, kUpdateWidth], zeros behind the last.
void pack_panel(const float* x, int64_t rank, int64_t count, bool halves, float* out) {
  if (count == kUpdateWidth && rank >= 8) {
    const float* from[kUpdateWidth];
    for (int64_t i = 0; i < kUpdateWidth; ++i) from[place_of(i, halves)] = x + i * rank;
    for (int64_t next = 0; next < rank; next += 8)
      for (int64_t place = 0; place < kUpdateWidth; place += 8)
        pack_eight(*reinterpret_cast<const float* const(*)[8]>(from + place), std::min(next, rank - 8), out + place);
    return;
  }
  if (count < kUpdateWidth) std::fill_n(out, rank * kUpdateWidth, 0.0f);
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t i = 0; i < count; ++i) out[k * kUpdateWidth + place_of(i, halves)] = x[i * rank + k];
}

// Whether x [count] holds neither NaN nor infinity.
bool finite_numbers(const float* x, int64_t count) {
  U32 carried[4] = {};  // out of an exponent of ones alone
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) carried[c] |= (load<U32>(x + i + c * kLanes) & 0x7f800000u) + 0x00800000u;
  for (; i < count; i += kLanes)
    carried[0] |= (load<U32>(x + i, (count - i) * sizeof(float)) & 0x7f800000u) + 0x00800000u;
  const U32 any = carried[0] | carried[1] | carried[2] | carried[3];
  uint32_t broken = 0;
  for (int64_t l = 0; l < kLanes; ++l) broken |= any[l];
  return broken >> 31 == 0;
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
