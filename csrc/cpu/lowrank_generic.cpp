// Any machine.
#include <cstring>

#include "isa.h"
#include "lowrank.h"

namespace knowedit {
namespace {
#include "lowrank_kernels.h"
}  // namespace

const Probe kProbeGeneric = {see_strip, kLanes};
const UpdateKernel kUpdateGeneric[3] = {update_strip<BF16, 2>, update_strip<F16, 2>, update_strip<Plain, 2>};

}  // namespace knowedit
