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
    {update_strip<BF16, 2, 2>, update_strip<F16, 2, 2>, update_strip<Plain, 2, 2>}, see_strip<2>, pack_panel, kLanes};

}  // namespace knowedit
