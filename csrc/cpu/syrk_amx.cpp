// x86 with AMX: tiles of bf16 products, summed in float32. A bf16 key is one part, a float16 key the exact sum of two.
//
// One instruction sums 32 tokens: two chains of 16 from zero, their sum, and that added to the accumulator, each rounded
// to nearest: the chains of "exact" (see syrk_kernels.h), whose products have 16 bits and so seldom round at all. The
// small products come first, so that an accumulator is rounded once for 32 tokens at its full size.
//
// float32 keys need three parts and six products. Measured on a Xeon of model 207: no faster than AVX-512, because the
// parts come from the second cache, which is too slow for the tiles.
#include "isa.h"
#if defined(KNOWEDIT_AMX)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "syrk.h"

KNOWEDIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
namespace knowedit {
namespace {
constexpr int64_t kEdge = 192;  // rows and columns of a tile of C
#include "syrk_kernels.h"

constexpr int64_t kSquare = 16;                      // rows of a tile register, of 64 bytes each
constexpr int64_t kBytes = kSquare * 64;             // of a tile register
constexpr int64_t kStep = 32;                        // tokens of one instruction
constexpr int64_t kPanel = 2 * kSquare;              // columns
constexpr int64_t kFolds = kPanel * kPanel / kSquare;  // registers of a block of outputs

// The shape of every tile register, as LDTILECFG reads it.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__m512 load_row(const BF16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
__m512 load_row(const F16* x, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x)); }

// out[c, r] = in[r, c]
void transpose(const __m512i* in, __m512i* out) {
  __m512i a[kSquare], b[kSquare];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      b[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + k + 2]);
      b[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + k + 2]);
    }
  for (int k = 0; k < 4; ++k) {
    const __m512i low = _mm512_shuffle_i32x4(b[k], b[k + 4], 0x88), high = _mm512_shuffle_i32x4(b[k], b[k + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(b[k + 8], b[k + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(b[k + 8], b[k + 12], 0xdd);
    _mm512_storeu_si512(out + k, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(out + k + 4, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(out + k + 8, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(out + k + 12, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// One step of a panel: of its parts the first, then the second; of each two registers of 16 columns. As the right operand
// a register holds pairs of tokens row by row, as the left one its transpose.
template <int kParts, class T>
void pack_parts(const void* x, Type, const Rows& rows, int64_t tokens, int64_t columns, const Packing& out) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t exist = std::clamp<int64_t>(columns - half * kSquare, 0, kSquare);
    const __mmask16 mask = static_cast<__mmask16>((1u << exist) - 1);
    __m512i parts[kParts][kSquare];
    for (int64_t t = 0; t < kStep; ++t) {
      __m512 rest = _mm512_setzero_ps();
      if (t < tokens && exist > 0) rest = load_row(static_cast<const T*>(x) + rows.at(t) * rows.stride + half * kSquare, mask);
      for (int p = 0; p < kParts; ++p) {
        const __m512i part = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
        const __m512i high = _mm512_slli_epi32(part, 16);
        parts[p][t / 2] = t % 2 ? _mm512_or_si512(parts[p][t / 2], high) : part;
        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(high));
      }
    }
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = (2 * p + half) * kBytes;
      std::memcpy(static_cast<char*>(out.right) + at, parts[p], kBytes);
      transpose(parts[p], reinterpret_cast<__m512i*>(static_cast<char*>(out.left) + at));
    }
  }
}

// A block of outputs that waits to be added to the sums while the tiles multiply the next one: a few registers at a time.
struct Waiting {
  float* from;
  double* to;
  int64_t next = kFolds;
  void fold(int64_t count) {
    for (const int64_t end = std::min(next + count, kFolds); next < end; ++next) {
      double* sum = to + next / 2 * kEdge + next % 2 * kSquare;
      const __m512 x = _mm512_loadu_ps(from + next * kSquare);
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), low));
      _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), high));
    }
  }
};

// The instructions name their registers: 0 to 3 the outputs, 4 and 5 the left operand, 6 and 7 the right one.
inline __attribute__((always_inline)) void load_left(const char* part) {
  _tile_loadd(4, part, 64);
  _tile_loadd(5, part + kBytes, 64);
}
inline __attribute__((always_inline)) void load_right(const char* part) {
  _tile_loadd(6, part, 64);
  _tile_loadd(7, part + kBytes, 64);
}
inline __attribute__((always_inline)) void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
inline __attribute__((always_inline)) void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline __attribute__((always_inline)) void store(float* out) {
  constexpr int64_t kRowBytes = kPanel * sizeof(float);
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + kSquare, kRowBytes);
  _tile_stored(2, out + kSquare * kPanel, kRowBytes);
  _tile_stored(3, out + kSquare * kPanel + kSquare, kRowBytes);
}

// The products of one step with a second part.
inline __attribute__((always_inline)) void multiply_small(const char* left, const char* right) {
  constexpr int64_t kPart = 2 * kBytes;
  load_left(left);
  load_right(right + kPart);
  multiply();
  load_left(left + kPart);
  multiply();
  load_right(right);
  multiply();
}

constexpr int64_t kAccumulated = 512 / kStep;  // steps that one accumulator sums in float32

template <int kParts>
void tile_parts(const char* a, const char* b, int64_t a_columns, int64_t b_columns, int64_t steps, int64_t tokens,
                bool diagonal, double* sum, Ahead& ahead) {
  constexpr int64_t kStepBytes = kParts * 2 * kBytes;
  alignas(64) float scratch[2][kPanel * kPanel];
  const Shapes shapes;
  _tile_loadconfig(&shapes);
  const int64_t i_blocks = (a_columns + kPanel - 1) / kPanel, j_blocks = (b_columns + kPanel - 1) / kPanel;
  ahead.divide((diagonal ? i_blocks * j_blocks / 2 : i_blocks * j_blocks) + 1);
  const int64_t most = tokens < kDepth * kEnough ? 1 : kAccumulated;
  Waiting waiting{scratch[1], sum};
  int64_t turn = 0;
  for (int64_t j = 0; j < j_blocks; ++j)
    for (int64_t i = diagonal ? j : 0; i < i_blocks; ++i, ahead.fetch())
      for (int64_t from = 0; from < steps; from += most) {
        const int64_t count = std::min(most, steps - from);
        const int64_t share = (kFolds + count - 1) / count;
        const char* const left_panel = a + (i * steps + from) * kStepBytes;
        const char* const right_panel = b + (j * steps + from) * kStepBytes;
        clear();
        if constexpr (kParts > 1)
          for (int64_t s = 0; s < count; ++s) {
            multiply_small(left_panel + s * kStepBytes, right_panel + s * kStepBytes);
            waiting.fold(share);
          }
        for (int64_t s = 0; s < count; ++s) {
          load_left(left_panel + s * kStepBytes);
          load_right(right_panel + s * kStepBytes);
          multiply();
          if constexpr (kParts == 1) waiting.fold(share);
        }
        waiting.fold(kFolds);
        float* out = scratch[turn ^= 1];
        store(out);
        waiting = {out, sum + i * kPanel * kEdge + j * kPanel, 0};
      }
  waiting.fold(kFolds);
  _tile_release();
}

template <int kParts, class T>
constexpr SyrkKernels amx() {
  return {kPanel, kStep, kParts * 2 * kBytes, pack_parts<kParts, T>, tile_parts<kParts>, kAdd, kEdge, 512 / kParts, 1024, true};
}

}  // namespace

const SyrkKernels kSyrkAmxBf16 = amx<1, BF16>(), kSyrkAmxF16 = amx<2, F16>();

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
