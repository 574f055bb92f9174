// x86 with AVX2 and FMA: 6 x 16 outputs in twelve registers.
#if defined(__x86_64__)
#include <cstring>

#include "isa.h"
#include "lowrank.h"

#define KNOWEDIT_DIRECT  // a product of rank 1 is made where it is added
KNOWEDIT_TARGET_BEGIN("avx2,fma")
namespace knowedit {
namespace {
#include "lowrank_kernels.h"
}  // namespace

const Probe kProbeAvx2 = {see_strip, kLanes};
const UpdateKernel kUpdateAvx2[3] = {update_strip<BF16, 2>, update_strip<F16, 2>, update_strip<Plain, 2>};

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
