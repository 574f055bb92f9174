// x86 with AVX2 and FMA: 2 x 32 outputs in eight registers of sixteen.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "lowrank.h"

#define KNOWEDIT_REGISTERS "+x"
KNOWEDIT_TARGET_BEGIN("avx2,fma")
namespace knowedit {
namespace {
#include "lowrank_kernels.h"
#include "lowrank_panels.h"
}  // namespace

const LowRankKernels kLowRankAvx2 = {
    {update_strip<BF16, false, 2, 4>, update_strip<F16, false, 2, 4>, update_strip<Plain, false, 2, 4>},
    {update_strip<BF16, true, 2, 4>, update_strip<F16, true, 2, 4>, update_strip<Plain, true, 2, 4>},
    see_strip<4>, pack_panel, finite_numbers, kLanes};

}  // namespace knowedit
KNOWEDIT_TARGET_END
#endif
