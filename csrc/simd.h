// Which instructions this machine has, found once at run time; the build itself assumes none.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define COMPACT_X86 1
#define COMPACT_TARGET_POPCNT __attribute__((target("popcnt")))
#define COMPACT_TARGET_AVX2 __attribute__((target("avx2,popcnt")))
#else
#define COMPACT_X86 0
#define COMPACT_TARGET_POPCNT
#define COMPACT_TARGET_AVX2
#endif

#if defined(__GNUC__) || defined(__clang__)
#define COMPACT_POPCOUNT(x) __builtin_popcountll(x)
#define COMPACT_VECTORS 1  // vector types: the work of a training step is there
#else
#include <bitset>
#define COMPACT_POPCOUNT(x) std::bitset<64>(x).count()
#define COMPACT_VECTORS 0
#endif

namespace compact {

// 0: plain C++, 1: AVX2 and POPCNT, 2: AVX-512 too (F, BW, DQ, VL). No more
// than torch may use, where ATEN_CPU_CAPABILITY says. Results never depend on it.
int simd_level();

// For tests: -1 = detect, else no more than this level.
void force_simd_level(int level);

}  // namespace compact
