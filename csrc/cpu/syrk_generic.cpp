// Any machine: four-lane vectors of the compiler, no fused multiply-add assumed.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "syrk.h"

namespace knowedit {
namespace {
constexpr int64_t kEdge = kTile;  // rows and columns of a tile of C
#include "syrk_kernels.h"

template <class T>
struct Vector {
  using Packed = T;
  typedef T Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T), kRegisters = 16;
  static Reg load(const T* p) { Reg r; std::memcpy(&r, p, sizeof(r)); return r; }
  static void store(T* p, Reg x) { std::memcpy(p, &x, sizeof(x)); }
  static Reg broadcast(const T* p) { return *p - Reg{}; }
  static Reg multiply(Reg a, Reg b) { return a * b; }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return c + a * b; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static void fold(double* sum, Reg x) { for (int l = 0; l < kLanes; ++l) sum[l] += x[l]; }
};

}  // namespace

const SyrkKernels kSyrkGeneric[3] = {kernels<Vector<float>, 4, 2, true, false>(), kernels<Vector<float>, 4, 2, false, false>(),
                                     kernels<Vector<double>, 4, 2, false, false>()};
const AuditKernel kAuditGeneric = audit;

}  // namespace knowedit
