// Follows every address of the sm_90a second moment on a CPU: what the copy engine writes where (swizzled), what each
// descriptor makes wgmma read, which thread holds which entry, and the chains. Built by test_cuda_layout.py.
#include <cmath>
#include <cstring>
#include <vector>

#include "syrk_layout.h"

using namespace knowedit;

namespace {

// The 128-byte swizzle: address bits 4-6 are XORed with bits 7-9.
uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// As PTX describes an MN-major operand with 128-byte swizzle: 64 channels, eight tokens of 128 bytes, then the strides.
uint32_t operand_address(uint64_t descriptor, int channel, int token) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  return swizzle(start + channel / 64 * leading + token / 8 * stride + token % 8 * 128 + channel % 64 * 2);
}

float to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Warpgroup {
  std::vector<float> acc = std::vector<float>(128 * kAccumulators), moved = acc;
};

void multiply(Warpgroup& group, const std::vector<float>& shared, uint64_t left, uint64_t right) {
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kAccumulators; ++i)
      for (int k = 0; k < kMmaTokens; ++k)
        group.acc[t * kAccumulators + i] += shared[operand_address(left, fragment_row(t, i), k) / 2] *
                                            shared[operand_address(right, fragment_column(t, i), k) / 2];
}

}  // namespace

extern "C" void constants(int* out) {
  const int values[] = {kRows, kColumns, kTokens, kLayers, kThreads, kAccumulators, kSharedBytes};
  std::memcpy(out, values, sizeof values);
}

extern "C" uint64_t operand(int right, int stage, int k) {
  return right ? right_operand(stage, k) : left_operand(stage, 0, k);
}

extern "C" void chain_bounds(int index, int tokens, int cap, int first, int doublings, int* out) {
  const Chain chain = chain_at(index, tokens, cap, first, doublings);
  out[0] = chain.begin, out[1] = chain.end, out[2] = chains(tokens, cap, doublings);
}

// c [d, d] += keys^T keys for every tile [programs, 4] of one layer; keys [tokens, d]. Returns how many stages ran.
extern "C" int emulate(const float* keys, int tokens, int d, double* c, const int* tiles, int programs, int cap, int first,
                       int doublings) {
  int ran = 0;
  for (int program = 0; program < programs; ++program) {
    const int row = tiles[4 * program + 1], column = tiles[4 * program + 2];
    const uint32_t stage = program % kStages * kStageBytes;  // any stage: all start at multiples of 1024
    std::vector<float> shared(kStages * kStageBytes / 2);
    std::vector<Warpgroup> groups(kConsumers);
    for (int index = 0; index < chains(tokens, cap, doublings); ++index) {
      const Chain chain = chain_at(index, tokens, cap, first, doublings);
      const float half = half_of_prediction(chain);
      if (index > 0)
        for (Warpgroup& group : groups)
          for (int i = 0; i < 128 * kAccumulators; ++i) {
            const float move = to_bfloat16(group.acc[i] + (group.moved[i] + group.acc[i]) * half);
            group.moved[i] += move;
            group.acc[i] -= move;
          }
      for (int token = chain.begin; token < chain.end; token += kTokens, ++ran) {
        std::fill(shared.begin(), shared.end(), NAN);
        for (int b = 0; b < kBoxes; ++b)
          for (int r = 0; r < kTokens; ++r)
            for (int j = 0; j < kBox; ++j) {
              const int channel = box_channel(b, row, column) + j, t = token + r;
              shared[swizzle(stage + b * kBoxBytes + r * 128 + j * 2) / 2] =
                  t < tokens && channel < d ? keys[int64_t(t) * d + channel] : 0.0f;
            }
        for (int w = 0; w < kConsumers; ++w)
          for (int k = 0; k < kTokens / kMmaTokens; ++k)
            multiply(groups[w], shared, left_operand(stage, w, k), right_operand(stage, k));
      }
    }
    for (int w = 0; w < kConsumers; ++w)
      for (int t = 0; t < 128; ++t)
        for (int i = 0; i < kAccumulators; ++i) {
          const int r = row * kRows + w * kWarpgroupRows + fragment_row(t, i), j = column * kColumns + fragment_column(t, i);
          const int at = t * kAccumulators + i;
          if (r < d && j < d) c[int64_t(r) * d + j] += double(groups[w].moved[at]) + double(groups[w].acc[at]);
        }
  }
  return ran;
}
