// The sums of rows, written once with the compiler's vectors and compiled once per instruction set.
// Included inside KNOWEDIT_TARGET_BEGIN/END and an anonymous namespace; no include may follow here.

typedef uint64_t Lanes __attribute__((vector_size(32)));
typedef uint32_t Halves __attribute__((vector_size(32)));

template <class V>
inline V load_lanes(const char* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// low half times high half, lane by lane
#ifdef KNOWEDIT_MULTIPLY_HALVES  // one instruction, which the compiler does not find
inline Lanes halves_product(Lanes x) { return (Lanes)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32)); }
#else
inline Lanes halves_product(Lanes x) { return (x & 0xffffffffu) * (x >> 32); }
#endif

// (low + its key) (high + its key) mod 2^64: with random keys, two rows agree by a chance of 2^-32 (NH of Black et
// al., CRYPTO 1999)
inline uint64_t product(uint64_t lane, uint64_t key) {
  return uint64_t(uint32_t(lane) + uint32_t(key)) * uint64_t(uint32_t(lane >> 32) + uint32_t(key >> 32));
}

// Adds to the two sums of R rows: one stream of memory alone does not fill the bus, and the keys are read once for all.
template <int R>
inline void few_rows(const char* rows, int64_t stride, const uint64_t* keys, int64_t bytes, uint64_t* sums) {
  Lanes mixed[R] = {}, plain[R] = {};
  const char* key = reinterpret_cast<const char*>(keys);
  constexpr int64_t kStep = sizeof(Lanes);
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep) {
    const Halves k = load_lanes<Halves>(key + at);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Halves x = load_lanes<Halves>(rows + r * stride + at);
      mixed[r] += halves_product((Lanes)(x + k));
      plain[r] += (Lanes)x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    uint64_t first = 0, second = 0;
    for (int l = 0; l < 4; ++l) first += mixed[r][l], second += plain[r][l];
    for (int64_t rest = at; rest < bytes; rest += 8) {  // the row ends with zeros
      uint64_t lane = 0;
      std::memcpy(&lane, rows + r * stride + rest, std::min<int64_t>(8, bytes - rest));
      first += product(lane, keys[rest / 8]);
      second += lane;
    }
    sums[2 * r] += first;
    sums[2 * r + 1] += second;
  }
}

// See `RowSums`.
void row_sums(const char* rows, int64_t stride, int64_t count, const uint64_t* keys, int64_t bytes, uint64_t* sums) {
  for (; count >= 4; count -= 4, rows += 4 * stride, sums += 8) few_rows<4>(rows, stride, keys, bytes, sums);
  for (; count >= 2; count -= 2, rows += 2 * stride, sums += 4) few_rows<2>(rows, stride, keys, bytes, sums);
  if (count) few_rows<1>(rows, stride, keys, bytes, sums);
}
