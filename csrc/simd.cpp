#include "simd.h"

#include <atomic>

namespace compact {

namespace {
std::atomic<int> forced_level{-1};
}

int simd_level() {
#if COMPACT_X86
  static const bool first = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
  static const bool second = __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  static const int detected = first ? (second ? 2 : 1) : 0;
#else
  static const int detected = 0;
#endif
  const int forced = forced_level.load(std::memory_order_relaxed);
  return forced >= 0 && forced < detected ? forced : detected;
}

void force_simd_level(int level) { forced_level.store(level); }

}  // namespace compact
