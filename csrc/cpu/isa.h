// Instruction sets a kernel may be compiled for. The numbers are part of the op schema (see _ops.py).
#pragma once

namespace knowedit {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (avx2) return kAvx2;
#endif
  return kGeneric;
}

}  // namespace knowedit

// Everything between KNOWEDIT_TARGET_BEGIN(...) and KNOWEDIT_TARGET_END is compiled for the given instruction
// set, so that one binary serves every machine. Standard headers must be included before.
#define KNOWEDIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KNOWEDIT_TARGET_BEGIN(isa) \
  KNOWEDIT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define KNOWEDIT_TARGET_END _Pragma("clang attribute pop")
#else
#define KNOWEDIT_TARGET_BEGIN(isa) _Pragma("GCC push_options") KNOWEDIT_PRAGMA(GCC target(isa))
#define KNOWEDIT_TARGET_END _Pragma("GCC pop_options")
#endif
