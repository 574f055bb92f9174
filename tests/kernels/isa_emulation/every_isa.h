// Included before every source of csrc/cpu in the emulated build: nothing is compiled for other instructions than the
// machine's own, every instruction set may be asked for, and AVX-512 takes the kernels that the processor does not.
#pragma once
#define KNOWEDIT_EMULATED
#define best_isa isa_of_the_processor
#define multiplies_halves processor_multiplies_halves
#include "isa.h"
#undef best_isa
#undef multiplies_halves
#undef KNOWEDIT_TARGET_BEGIN
#undef KNOWEDIT_TARGET_END
#define KNOWEDIT_TARGET_BEGIN(isa)
#define KNOWEDIT_TARGET_END

namespace knowedit {
inline Isa best_isa() { return kAmx; }
inline bool multiplies_halves() { return !processor_multiplies_halves(); }
}  // namespace knowedit
