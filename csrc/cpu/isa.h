// Instruction sets a kernel may be compiled for. The numbers are part of the op schema (see _ops.py).
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// AMX: the compiler must know the instructions, and Linux lends a process the tiles.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define KNOWEDIT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace knowedit {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

#if defined(KNOWEDIT_AMX)
// Whether the processor multiplies tiles of bf16, and the system lets this process do it.
inline bool has_amx() {
  static const bool has = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7, register d
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}
#endif

inline Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(KNOWEDIT_AMX)
  if (bf16 && has_amx()) return kAmx;
#endif
  if (avx512) return bf16 ? kAvx512Bf16 : kAvx512;
  if (avx2) return kAvx2;
#endif
  return kGeneric;
}

// Whether the processor multiplies AVX-512's vectors in halves of 256 bits, as it says itself (AMD's leaf 8000001A: FP256
// and not FP512). Then there is one product a cycle, bf16 or float32, and time to load an operand for each.
inline bool multiplies_halves() {
#if defined(__x86_64__)
  constexpr unsigned kFp256 = 1u << 2, kFp512 = 1u << 3;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0x8000001a, &a, &b, &c, &d) && (a & (kFp256 | kFp512)) == kFp256;
#else
  return false;
#endif
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
