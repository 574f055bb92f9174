// Any machine.
#include <cstring>

#include "isa.h"
#include "lowrank.h"

namespace knowedit {
namespace {
#include "lowrank_kernels.h"
}  // namespace

const UpdateKernel kUpdateGeneric[3] = {update_strip<BF16, 1>, update_strip<F16, 1>, update_strip<Plain, 1>};

}  // namespace knowedit
