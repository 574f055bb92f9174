// The self-centred second moment for Hopper: persistent, one producer warpgroup (TMA) and two that multiply (wgmma).
//
// The scheme is that of moments/triton.py: before every chain of tokens the accumulator is moved to minus half of what
// the chain should add, because tensor cores truncate; the moves, rounded to bfloat16, and their sum are exact.
#pragma once

#include <cuda_bf16.h>

#include "hopper.cuh"
#include "syrk_layout.h"

namespace knowedit {

struct Layers {
  CUtensorMap keys[kLayers];  // [tokens, d], boxes of kTokens x kBox, 128-byte swizzle
  double* c[kLayers];         // [d, d], row stride ld
  int tokens[kLayers];
};

struct Chains {
  int cap, first, doublings;
};

// A ring of stages; `phase` flips every round.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

struct Stages {
  uint32_t data, barriers;
  __device__ uint32_t at(int stage) const { return data + stage * kStageBytes; }
  __device__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
};

__device__ void produce(const Layers& layers, const int4* tiles, int programs, int d, int64_t ld, Stages stages) {
  constexpr int kAhead = 4;  // rows of C to prefetch with each of the last stages, for the fold
  Ring ring;
  for (int program = blockIdx.x; program < programs; program += gridDim.x) {
    const int4 tile = tiles[program];
    const int tokens = layers.tokens[tile.x];
    const int row = tile.y * kRows, column = tile.z * kColumns, bytes = 8 * (column + kColumns < d ? kColumns : d - column);
    for (int token = 0; token < tokens; token += kTokens, ring.next()) {
      barrier_wait(stages.empty(ring.stage), ring.phase ^ 1);
      const uint32_t full = stages.full(ring.stage);
      barrier_expect(full, kStageBytes);
      for (int b = 0; b < kBoxes; ++b)
        copy_box(stages.at(ring.stage) + b * kBoxBytes, &layers.keys[tile.x], box_channel(b, tile.y, tile.z), token, full);
      const int behind = kRows - kAhead * ((tokens - token + kTokens - 1) / kTokens);  // counts up to kRows - kAhead
      for (int r = row + behind; behind >= 0 && r < row + behind + kAhead && r < d; ++r)
        prefetch(layers.c[tile.x] + r * ld + column, bytes);
    }
  }
}

// Moves the accumulator by `half` of the running total, downwards where that is positive.
__device__ __forceinline__ void recentre(float (&acc)[kAccumulators], float (&moved)[kAccumulators], float half) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const float total = __fadd_rn(moved[i], acc[i]);
    const float move = __bfloat162float(__float2bfloat16_rn(__fadd_rn(acc[i], __fmul_rn(total, half))));
    moved[i] = __fadd_rn(moved[i], move);
    acc[i] = __fsub_rn(acc[i], move);
  }
}

// c += moved + acc in float64 where inside [d, d]; pairs of columns, of which d has a whole number.
__device__ __forceinline__ void fold(double* c, int64_t ld, int d, int row, int column, const float (&acc)[kAccumulators],
                                     const float (&moved)[kAccumulators]) {
  constexpr int kBatch = 8;  // accumulators between a load and its use
  const int t = threadIdx.x % 128;
#pragma unroll
  for (int start = 0; start < kAccumulators; start += kBatch) {
    double2 old[kBatch / 2];
#pragma unroll
    for (int i = 0; i < kBatch; i += 2) {
      const int r = row + fragment_row(t, start + i), j = column + fragment_column(t, start + i);
      if (r < d && j < d) old[i / 2] = __ldcs(reinterpret_cast<const double2*>(c + r * ld + j));
    }
#pragma unroll
    for (int i = 0; i < kBatch; i += 2) {
      const int r = row + fragment_row(t, start + i), j = column + fragment_column(t, start + i), n = start + i;
      if (r >= d || j >= d) continue;
      old[i / 2].x += double(moved[n]) + double(acc[n]);
      old[i / 2].y += double(moved[n + 1]) + double(acc[n + 1]);
      __stcs(reinterpret_cast<double2*>(c + r * ld + j), old[i / 2]);
    }
  }
}

template <bool kBfloat16>
__device__ void consume(const Layers& layers, const int4* tiles, int programs, int d, int64_t ld, Chains chain_sizes,
                        Stages stages) {
  const int warpgroup = threadIdx.x / 128 - 1;
  const bool speaker = threadIdx.x % 128 == 0;
  Ring ring;
  for (int program = blockIdx.x; program < programs; program += gridDim.x) {
    const int4 tile = tiles[program];
    const int tokens = layers.tokens[tile.x];
    float acc[kAccumulators] = {}, moved[kAccumulators] = {};
    const int count = chains(tokens, chain_sizes.cap, chain_sizes.doublings);
    for (int index = 0; index < count; ++index) {
      const Chain chain = chain_at(index, tokens, chain_sizes.cap, chain_sizes.first, chain_sizes.doublings);
      if (index > 0) recentre(acc, moved, half_of_prediction(chain));
#pragma unroll 1
      for (int token = chain.begin; token < chain.end; token += kTokens, ring.next()) {
        barrier_wait(stages.full(ring.stage), ring.phase);
        products_begin(acc);
#pragma unroll
        for (int k = 0; k < kTokens / kMmaTokens; ++k)
          product<kBfloat16>(acc, left_operand(stages.at(ring.stage), warpgroup, k), right_operand(stages.at(ring.stage), k));
        products_end(acc);  // meanwhile the tensor cores work for the other warpgroup
        if (speaker) barrier_arrive(stages.empty(ring.stage));
      }
    }
    fold(layers.c[tile.x], ld, d, tile.y * kRows + warpgroup * kWarpgroupRows, tile.z * kColumns, acc, moved);
  }
}

// C[tile] += keys^T keys for every (layer, row, column, -) of tiles [programs, 4].
template <bool kBfloat16>
__global__ void __launch_bounds__(kThreads, 1)
    syrk_kernel(const __grid_constant__ Layers layers, const int4* tiles, int programs, int d, int64_t ld, Chains chain_sizes) {
  extern __shared__ uint8_t shared[];
  const uint32_t start = (shared_address(shared) + 1023) / 1024 * 1024;
  const Stages stages{start, start + kStages * kStageBytes};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(stages.full(i), 1);
      barrier_init(stages.empty(i), kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x == 0) produce(layers, tiles, programs, d, ld, stages);
  } else {
    take_registers<240>();
    consume<kBfloat16>(layers, tiles, programs, d, ld, chain_sizes, stages);
  }
}

}  // namespace knowedit
