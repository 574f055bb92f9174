// Packing, tiles and the audit, written once over a vector type V and compiled once per instruction set.
// Included inside KNOWEDIT_TARGET_BEGIN/END and an anonymous namespace; no include may follow here.
//
// V: Packed (4-byte element), Reg, kLanes, zero, load, broadcast, multiply_add, fold (float64 += float32).

// Tokens summed in a float32 register. So few, because squares of bf16 numbers are not uniform in their low bits (a
// square is 0, 1 or 4 modulo 8): even round-to-nearest loses 1.2e-9 of the sum per token of chain length.
constexpr int64_t chain_length(int64_t tokens) { return tokens < 128 ? 8 : 16; }
// Tokens per pass over a tile: a strip of each operand then stays in L1.
constexpr int64_t kDepth = 128;
// Tokens whose chains are added up in float32 before the float64 fold, which costs as much as four tokens. A channel
// that never changes makes the same rounding error every time: n additions lose some (n + 1) / 2 * 2^-25 of the sum, 17
// and 9 halves for eight chains of 16 (4.1e-7 measured as the worst of 400 constants, of the 5e-7 that an element may be
// off), 33 for one chain of 32. A call with few tokens has few sums to average over and folds every chain.
constexpr int64_t fold_length(int64_t tokens) { return tokens < 512 ? chain_length(tokens) : kDepth; }

inline float widen(float x) { return x; }
struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float widen(BF16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float widen(F16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // rebias the exponent by a multiplication, which also normalises subnormals; infinity and NaN keep theirs
  const float finite = as_float(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &finite, 4);
  bits = (x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits;
  return as_float(bits | uint32_t(x.bits & 0x8000) << 16);
}

template <class T>
void pack_f32(const T* x, const Rows& rows, int64_t tokens, int64_t columns, float* out) {
  for (int64_t t = 0; t < tokens; ++t, out += kPanel) {
    const T* row = x + rows.at(t) * rows.stride;
    const float weight = rows.weight(t);
    if (columns >= kPanel) {
      for (int64_t l = 0; l < kPanel; ++l) out[l] = weight * widen(row[l]);
    } else {
      for (int64_t l = 0; l < kPanel; ++l) out[l] = l < columns ? weight * widen(row[l]) : 0.0f;
    }
  }
}

inline void pack_float(const void* x, Type type, const Rows& rows, int64_t tokens, int64_t columns, void* out) {
  float* o = static_cast<float*>(out);
  if (type == Type::kF32) pack_f32(static_cast<const float*>(x), rows, tokens, columns, o);
  if (type == Type::kF16) pack_f32(static_cast<const F16*>(x), rows, tokens, columns, o);
  if (type == Type::kBF16) pack_f32(static_cast<const BF16*>(x), rows, tokens, columns, o);
}

// Register chains of `length` over `steps`, added up and folded into sum[MR, NV * kLanes].
template <class V, int MR, int NV>
inline void chains(const typename V::Packed* a, const typename V::Packed* b, int64_t steps, int64_t length, double* sum) {
  typename V::Reg total[MR][NV];  // there are no registers left for it: on the stack
  for (int64_t s = 0; s < steps;) {
    typename V::Reg acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = V::zero();
    const bool first = s == 0;
    for (const int64_t end = std::min(steps, s + length); s < end; ++s, a += kPanel, b += kPanel) {
      typename V::Reg right[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) right[v] = V::load(b + v * V::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const typename V::Reg left = V::broadcast(a + r);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = V::multiply_add(left, right[v], acc[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) total[r][v] = first ? acc[r][v] : total[r][v] + acc[r][v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) V::fold(sum + r * kTile + v * V::kLanes, total[r][v]);
}

template <class V, int MR, int NV, int kTokensPerStep>
void tile(const char* a, const char* b, int64_t stride, int64_t a_panels, int64_t b_panels, int64_t steps,
          bool diagonal, double* sum) {
  using Packed = typename V::Packed;
  constexpr int64_t NR = NV * V::kLanes, depth = kDepth / kTokensPerStep;
  const int64_t length = chain_length(steps * kTokensPerStep) / kTokensPerStep;
  const int64_t fold = fold_length(steps * kTokensPerStep) / kTokensPerStep;
  static_assert(kPanel % MR == 0 && kPanel % NR == 0);
  for (int64_t s0 = 0; s0 < steps; s0 += depth) {
    const int64_t s1 = std::min(steps, s0 + depth);
    for (int64_t j = 0; j < b_panels * kPanel; j += NR) {
      const Packed* right = reinterpret_cast<const Packed*>(b + j / kPanel * stride) + j % kPanel;
      for (int64_t i = 0; i < a_panels * kPanel; i += MR) {
        if (diagonal && i + MR <= j) continue;
        const Packed* left = reinterpret_cast<const Packed*>(a + i / kPanel * stride) + i % kPanel;
        for (int64_t s = s0; s < s1; s += fold)
          chains<V, MR, NV>(left + s * kPanel, right + s * kPanel, std::min(fold, s1 - s), length, sum + i * kTile + j);
      }
    }
  }
}

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

inline Float8 load8(const float* x) { Float8 v; std::memcpy(&v, x, sizeof(v)); return v; }
template <class T>
inline Float8 load8(const T* x) {
  Float8 v;
  for (int l = 0; l < 8; ++l) v[l] = widen(x[l]);
  return v;
}

template <class T>
void audit_row(const T* x, int64_t d, const double* signs, double* out) {
  Double8 sums[1 + kProbes] = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8) {
    const Double8 value = __builtin_convertvector(load8(x + j), Double8);
    sums[0] += value * value;
    for (int64_t p = 0; p < kProbes; ++p) {
      Double8 sign;
      std::memcpy(&sign, signs + p * d + j, sizeof(sign));
      sums[1 + p] += value * sign;
    }
  }
  for (; j < d; ++j) {
    const double value = widen(x[j]);
    sums[0][0] += value * value;
    for (int64_t p = 0; p < kProbes; ++p) sums[1 + p][0] += value * signs[p * d + j];
  }
  for (int64_t p = 0; p <= kProbes; ++p) {
    double total = 0;
    for (int l = 0; l < 8; ++l) total += sums[p][l];
    out[p] += p == 0 ? total : total * total;
  }
}

inline void audit(const void* x, Type type, int64_t d, const double* signs, double* out) {
  if (type == Type::kF32) audit_row(static_cast<const float*>(x), d, signs, out);
  if (type == Type::kF16) audit_row(static_cast<const F16*>(x), d, signs, out);
  if (type == Type::kBF16) audit_row(static_cast<const BF16*>(x), d, signs, out);
}
