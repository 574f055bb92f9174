// The index arithmetic of the sm_90a second moment: tiles, stages, descriptors, chains, accumulator fragments.
// Plain C++, so that tests/kernels/syrk_emulation.cpp can follow every address on a machine without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KNOWEDIT_BOTH __host__ __device__
#else
#define KNOWEDIT_BOTH
#endif

namespace knowedit {

// One tile of C: 128 x 192. Each of two warpgroups holds 64 x 192 twice (accumulator and amount moved), 192 registers
// a thread; 128 x 256 would need 256 of the 255 there are.
constexpr int kRows = 128, kColumns = 192, kWarpgroupRows = 64;
constexpr int kConsumers = kRows / kWarpgroupRows, kThreads = 128 * (1 + kConsumers);
constexpr int kAccumulators = kWarpgroupRows * kColumns / 128;
// One stage: 64 tokens. Shared memory holds it in boxes of 64 channels, a token's 128 bytes to a row, 128-byte swizzle.
constexpr int kTokens = 64, kBox = 64, kBoxBytes = kTokens * kBox * 2;
constexpr int kBoxes = (kRows + kColumns) / kBox, kStageBytes = kBoxes * kBoxBytes, kStages = 5;
constexpr int kMmaTokens = 16;                                        // of one wgmma
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 16 * kStages;  // alignment, two barriers a stage
constexpr int kLayers = 16;                                           // of one launch

// The first channel of box b of the tile at (row, column) in tiles: rows' boxes first, then columns'.
KNOWEDIT_BOTH constexpr int box_channel(int b, int row, int column) {
  return b < kRows / kBox ? row * kRows + b * kBox : column * kColumns + (b - kRows / kBox) * kBox;
}

// wgmma's matrix descriptor for an operand whose channels are contiguous ("MN-major"), swizzled by 128 bytes: from one
// 64-channel box to the next (leading offset) and from eight tokens to the next eight (stride offset), in bytes / 16.
KNOWEDIT_BOTH constexpr uint64_t descriptor(uint32_t address) {
  return (uint64_t(address & 0x3FFFF) >> 4) | (uint64_t(kBoxBytes >> 4) << 16) | (uint64_t(8 * 128 >> 4) << 32) |
         (uint64_t(1) << 62);
}

// The operands of step k (16 tokens each) in the stage that starts at `stage`, a multiple of 1024.
KNOWEDIT_BOTH constexpr uint64_t left_operand(uint32_t stage, int warpgroup, int k) {
  return descriptor(stage + warpgroup * kBoxBytes + k * kMmaTokens * 128);
}
KNOWEDIT_BOTH constexpr uint64_t right_operand(uint32_t stage, int k) {
  return descriptor(stage + kRows / kBox * kBoxBytes + k * kMmaTokens * 128);
}

// Where thread t (0..127) of a warpgroup keeps accumulator i: row 0..63, column 0..191.
KNOWEDIT_BOTH constexpr int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
KNOWEDIT_BOTH constexpr int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// Chains of first, first, 2 first, 4 first, ... cap, cap, ... tokens (cap = first << doublings); cap 0: a single one.
// As in moments/triton.py.
struct Chain {
  int begin, end;
};
KNOWEDIT_BOTH constexpr int chains(int tokens, int cap, int doublings) {
  return cap ? doublings + (tokens + cap - 1) / cap : 1;
}
KNOWEDIT_BOTH constexpr Chain chain_at(int chain, int tokens, int cap, int first, int doublings) {
  if (cap == 0) return {0, tokens};
  const int settled = chain - doublings, growing = first << (settled < 0 ? chain : doublings);
  const int begin = chain == 0 ? 0 : settled <= 0 ? growing >> 1 : cap * settled;
  const int end = settled < 0 ? growing : cap * (settled + 1);
  return {begin < tokens ? begin : tokens, end < tokens ? end : tokens};
}

// By how much of its running total the accumulator is moved before a chain: half of what the chain should add.
KNOWEDIT_BOTH constexpr float half_of_prediction(Chain chain) {
  return 0.5f * float(chain.end - chain.begin) / float(chain.begin > 0 ? chain.begin : 1);
}

}  // namespace knowedit
