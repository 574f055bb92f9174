// Any machine.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "lowrank.h"

namespace knowedit {
namespace {
#include "lowrank_kernels.h"
#include "lowrank_panels.h"
}  // namespace

const LowRankKernels kLowRankGeneric = {
    {update_strip<BF16, false, 2, 2>, update_strip<F16, false, 2, 2>, update_strip<Plain, false, 2, 2>},
    {update_strip<BF16, true, 2, 2>, update_strip<F16, true, 2, 2>, update_strip<Plain, true, 2, 2>},
    see_strip<2>, pack_panel, finite_numbers, kLanes};

}  // namespace knowedit
