// x86 with AVX-512: 6 x 64 outputs in 24 registers.
#if defined(__x86_64__)
#include <cstring>

#include "isa.h"
#include "lowrank.h"

#define KNOWEDIT_AVX512
#define KNOWEDIT_DIRECT  // a product of rank 1 is made where it is added
KNOWEDIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace knowedit {
namespace {
#include "lowrank_kernels.h"
}  // namespace

const Probe kProbeAvx512 = {see_strip, kLanes};
const UpdateKernel kUpdateAvx512[3] = {update_strip<BF16, 4>, update_strip<F16, 4>, update_strip<Plain, 4>};

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
