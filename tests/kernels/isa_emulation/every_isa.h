// Included before every source of csrc/cpu in the emulated build: nothing is compiled for other instructions than the
// machine's own, and every instruction set may be asked for.
#pragma once
#define KNOWEDIT_EMULATED
#define best_isa isa_of_the_processor
#include "isa.h"
#undef best_isa
#undef KNOWEDIT_TARGET_BEGIN
#undef KNOWEDIT_TARGET_END
#define KNOWEDIT_TARGET_BEGIN(isa)
#define KNOWEDIT_TARGET_END

namespace knowedit {
inline Isa best_isa() { return kAmx; }
}  // namespace knowedit
