// Packing, tiles and the audit, written once over a vector type V and compiled once per instruction set.
// Included inside KNOWEDIT_TARGET_BEGIN/END and an anonymous namespace; no include may follow here.
//
// V: Packed (an element of a panel), Reg, kLanes, kRegisters (of the processor), load, store, broadcast, multiply, multiply_add, add, fold (float64 +=
// Reg).

// Exact: tokens summed in a float32 register. So few, because squares of bf16 numbers are not uniform in their low bits
// (a square is 0, 1 or 4 modulo 8): even round-to-nearest loses 1.2e-9 of the sum per token of chain length.
constexpr int64_t kChain = 16, kFewChain = 8;
// Exact: chains are added up in float32 for the kDepth tokens of a pass, then folded into float64. A channel that never
// changes makes the same rounding error every time: n additions lose some (n + 1) / 2 * 2^-25 of the sum, 17 and 9
// halves for eight chains of 16 (4.1e-7 measured as the worst of 400 constants, of the 5e-7 that an element may be off),
// 33 for one chain of 32. What else is lost averages over the sums that are folded: there are at least kEnough of them, so
// that a call with few tokens folds shorter ones, and below kDepth tokens chains are short as well.
constexpr int64_t kEnough = 4;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
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

template <class V, int64_t kPanel, class T>
void pack_rows(const T* x, const Rows& rows, int64_t tokens, int64_t columns, typename V::Packed* out) {
  using Packed = typename V::Packed;
  for (int64_t t = 0; t < tokens; ++t, out += kPanel) {
    const T* row = x + rows.at(t) * rows.stride;
    const Packed weight = rows.weight(t);
    if (columns >= kPanel) {
      for (int64_t l = 0; l < kPanel; ++l) out[l] = weight * static_cast<Packed>(widen(row[l]));
    } else {
      for (int64_t l = 0; l < kPanel; ++l) out[l] = l < columns ? weight * static_cast<Packed>(widen(row[l])) : Packed{};
    }
  }
}

template <class V, int64_t kPanel>
void pack(const void* x, Type type, const Rows& rows, int64_t tokens, int64_t columns, const Packing& out) {
  auto* o = static_cast<typename V::Packed*>(out.right);
  switch (type) {
    case Type::kF32: return pack_rows<V, kPanel>(static_cast<const float*>(x), rows, tokens, columns, o);
    case Type::kF16: return pack_rows<V, kPanel>(static_cast<const F16*>(x), rows, tokens, columns, o);
    case Type::kBF16: return pack_rows<V, kPanel>(static_cast<const BF16*>(x), rows, tokens, columns, o);
    case Type::kF64: return pack_rows<V, kPanel>(static_cast<const double*>(x), rows, tokens, columns, o);
  }
}

// One step of a chain: acc[MR, NV * kLanes] += a^T b, or = where it is the first.
template <class V, int MR, int NV>
inline __attribute__((always_inline)) void step(const typename V::Packed* a, const typename V::Packed* b, bool first,
                          typename V::Reg (&acc)[MR][NV]) {
  typename V::Reg right[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) right[v] = V::load(b + v * V::kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const typename V::Reg left = V::broadcast(a + r);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      acc[r][v] = first ? V::multiply(left, right[v]) : V::multiply_add(left, right[v], acc[r][v]);
  }
}

// each(r, v) for every register of outputs.
template <int MR, int NV, class Each>
inline __attribute__((always_inline)) void for_each_register(const Each& each) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) each(r, v);
}

// A block of outputs that waits to be added to the sums while the next one is multiplied, a few registers at a time: all at
// once, their conversions and stores would hold up the multipliers.
template <class V, int MR, int NV>
struct Pending {
  const typename V::Packed* from;
  double* to;
  int64_t next = MR * NV;
  void fold(int64_t count) {
    for (const int64_t end = std::min<int64_t>(next + count, MR * NV); next < end; ++next)
      V::fold(to + next / NV * kEdge + next % NV * V::kLanes, V::load(from + next * V::kLanes));
  }
};

// sum[MR, NV * kLanes] += a^T b over `steps`, at most kSteps: register chains of kLength steps, added up where there are
// registers for their total, else in `total`. With kWait the block is left in `total`, and the one before it is folded.
template <class V, int MR, int NV, int64_t kPanel, int64_t kLength, int64_t kSteps, bool kWait>
inline void chains(const typename V::Packed* a, const typename V::Packed* b, int64_t steps, typename V::Packed* total,
                   double* sum, Pending<V, MR, NV>& pending) {
  constexpr bool kHeld = kLength < kSteps && V::kRegisters > 2 * MR * NV + NV;
  constexpr int64_t kUnroll = std::min<int64_t>(kLength, 16);  // no loop in a chain of "exact": its end is mispredicted
  constexpr int64_t kShare = (MR * NV * kUnroll + kSteps - 1) / kSteps;
  typename V::Reg held[MR][NV];
  const auto place = [total](int r, int v) { return total + (r * NV + v) * V::kLanes; };
  for (int64_t s = 0; s < steps; s += kLength, a += kLength * kPanel, b += kLength * kPanel) {
    typename V::Reg acc[MR][NV];
    step<V, MR, NV>(a, b, true, acc);
    if (const int64_t length = std::min(steps - s, kLength); length == kLength) {
#pragma GCC unroll 16
      for (int64_t u = 1; u < kUnroll; ++u) step<V, MR, NV>(a + u * kPanel, b + u * kPanel, false, acc);
      if (kWait) pending.fold(kShare);
      for (int64_t t = kUnroll; t < kLength; t += kUnroll) {
#pragma GCC unroll 16
        for (int64_t u = t; u < t + kUnroll; ++u) step<V, MR, NV>(a + u * kPanel, b + u * kPanel, false, acc);
        if (kWait) pending.fold(kShare);
      }
    } else {
      for (int64_t u = 1; u < length; ++u) step<V, MR, NV>(a + u * kPanel, b + u * kPanel, false, acc);
    }
    if (s > 0)
      for_each_register<MR, NV>([&](int r, int v) { acc[r][v] = V::add(kHeld ? held[r][v] : V::load(place(r, v)), acc[r][v]); });
    if (s + kLength >= steps && !kWait)
      for_each_register<MR, NV>([&](int r, int v) { V::fold(sum + r * kEdge + v * V::kLanes, acc[r][v]); });
    else if (s + kLength >= steps || !kHeld)
      for_each_register<MR, NV>([&](int r, int v) { V::store(place(r, v), acc[r][v]); });
    if (kHeld) for_each_register<MR, NV>([&](int r, int v) { held[r][v] = acc[r][v]; });
  }
}

// The panels of a tile in chains of kLength steps, folded every kFold.
template <class V, int MR, int NV, int64_t kPanel, int64_t kLength, int64_t kFold, bool kWait>
void panels(const char* a, const char* b, int64_t a_columns, int64_t b_columns, int64_t steps, bool diagonal, double* sum,
            Ahead& ahead) {
  using Packed = typename V::Packed;
  constexpr int64_t NR = NV * V::kLanes;
  static_assert(kPanel % MR == 0 && kPanel % NR == 0 && kEdge % kPanel == 0);
  alignas(64) Packed scratch[2][MR * NR];
  Packed *total = scratch[0], *other = scratch[1];
  asm("" : "+r"(total), "+r"(other));  // the outputs take all registers: the compiler must not try to keep these in any
  Pending<V, MR, NV> pending{other, sum};
  const auto column = [steps](const char* x, int64_t j) {
    return reinterpret_cast<const Packed*>(x) + j / kPanel * kPanel * steps + j % kPanel;
  };
  const int64_t blocks = (a_columns + MR - 1) / MR * ((b_columns + NR - 1) / NR);
  ahead.divide(((diagonal ? blocks / 2 : blocks) + 1) * ((steps + kFold - 1) / kFold));
  for (int64_t j = 0; j < b_columns; j += NR)
    for (int64_t i = diagonal ? j / MR * MR : 0; i < a_columns; i += MR)
      for (int64_t s = 0; s < steps; s += kFold, ahead.fetch()) {
        double* out = sum + i * kEdge + j;
        chains<V, MR, NV, kPanel, kLength, kFold, kWait>(column(a, i) + s * kPanel, column(b, j) + s * kPanel,
                                                         std::min(kFold, steps - s), total, out, pending);
        if (kWait) {
          pending.fold(MR * NV);
          pending = {total, out, 0};
          std::swap(total, other);
        }
      }
  if (kWait) pending.fold(MR * NV);
}

template <class V, int MR, int NV, int64_t kPanel, int64_t kTokensPerStep, bool kShort, bool kWait>
void tile(const char* a, const char* b, int64_t a_columns, int64_t b_columns, int64_t steps, int64_t tokens, bool diagonal,
          double* sum, Ahead& ahead) {
  constexpr int64_t kAll = kDepth / kTokensPerStep, kLong = kChain / kTokensPerStep, kFew = kFewChain / kTokensPerStep;
  const auto run = [&](auto panels) { panels(a, b, a_columns, b_columns, steps, diagonal, sum, ahead); };
  if (!kShort) run(panels<V, MR, NV, kPanel, kAll, kAll, kWait>);
  else if (tokens < kDepth) run(panels<V, MR, NV, kPanel, kFew, kFew, kWait>);
  else if (tokens < kDepth / 2 * kEnough) run(panels<V, MR, NV, kPanel, kLong, kAll / 4, kWait>);
  else if (tokens < kDepth * kEnough) run(panels<V, MR, NV, kPanel, kLong, kAll / 2, kWait>);
  else run(panels<V, MR, NV, kPanel, kLong, kAll, kWait>);
}

template <class T>
void add_row(T* out, const double* sum, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<T>(out[c] + sum[c]);
}
constexpr Adding kAdd{add_row<double>, add_row<float>};

// The kernels of one arithmetic, MR x NV registers of outputs; kShort: in the chains of "exact"; kWait: see `Pending`.
template <class V, int MR, int NV, bool kShort, bool kWait>
constexpr SyrkKernels kernels() {
  constexpr int64_t kPanel = std::lcm(NV * V::kLanes, MR);
  return {kPanel, 1, kPanel * sizeof(typename V::Packed), pack<V, kPanel>, tile<V, MR, NV, kPanel, 1, kShort, kWait>, kAdd, kEdge};
}

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

template <class Vector>
inline Vector load8(const void* x) { Vector v; std::memcpy(&v, x, sizeof(v)); return v; }
inline Double8 load_wide(const float* x) { return __builtin_convertvector(load8<Float8>(x), Double8); }
inline Double8 load_wide(const double* x) { return load8<Double8>(x); }
template <class T>
inline Double8 load_wide(const T* x) {
  Float8 v;
  for (int l = 0; l < 8; ++l) v[l] = widen(x[l]);
  return __builtin_convertvector(v, Double8);
}

template <class T>
void audit_row(const T* x, int64_t d, const double* signs, double* out) {
  Double8 sums[1 + kProbes] = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8) {
    const Double8 value = load_wide(x + j);
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
  if (type == Type::kF64) audit_row(static_cast<const double*>(x), d, signs, out);
}
