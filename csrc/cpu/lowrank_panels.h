// Panels of V and of the probe keys, and what a strip's errors add to the output at the keys. Included behind
// lowrank_kernels.h, once per instruction set; no include may follow here.

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
