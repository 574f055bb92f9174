// Any machine: four-lane vectors of the compiler, no fused multiply-add assumed.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "syrk.h"

namespace knowedit {
namespace {
#include "syrk_kernels.h"

struct Vector {
  using Packed = float;
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static Reg zero() { return Reg{}; }
  static Reg load(const float* p) { Reg r; std::memcpy(&r, p, sizeof(r)); return r; }
  static Reg broadcast(const float* p) { return Reg{*p, *p, *p, *p}; }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return c + a * b; }
  static void fold(double* sum, Reg x) { for (int l = 0; l < kLanes; ++l) sum[l] += x[l]; }
};

}  // namespace

const SyrkKernels kSyrkGeneric{1, pack_float, tile<Vector, 4, 2, 1>, audit};

}  // namespace knowedit
