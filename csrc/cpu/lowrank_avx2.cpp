// x86 with AVX2 and FMA: a vector of sixteen is a pair of registers.
#if defined(__x86_64__)
#include <cstring>

#include "isa.h"
#include "lowrank.h"

KNOWEDIT_TARGET_BEGIN("avx2,fma")
namespace knowedit {
namespace {
#include "lowrank_kernels.h"
}  // namespace

const UpdateKernel kUpdateAvx2[3] = {update_strip<BF16, 1>, update_strip<F16, 1>, update_strip<Plain, 1>};

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
