// x86 with AVX-512: 3 x 64 outputs in twelve registers of 32.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "lowrank.h"

#define KNOWEDIT_AVX512
#define KNOWEDIT_REGISTERS "+v"
KNOWEDIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace knowedit {
namespace {
#include "lowrank_kernels.h"
#include "lowrank_panels.h"
}  // namespace

const LowRankKernels kLowRankAvx512 = {
    {update_strip<BF16, false, 3, 4>, update_strip<F16, false, 3, 4>, update_strip<Plain, false, 3, 4>},
    {update_strip<BF16, true, 3, 4>, update_strip<F16, true, 3, 4>, update_strip<Plain, true, 3, 4>},
    see_strip<8>, pack_panel, finite_numbers, kLanes};

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
