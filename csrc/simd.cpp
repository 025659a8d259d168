#include "simd.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

namespace compact {

namespace {
std::atomic<int> forced_level{-1};

#if COMPACT_X86
// Whoever limits torch limits us: two that are compared have the same instructions.
int allowed() {
  const char* found = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = found ? found : "";
  return name == "default" ? 0 : name == "avx2" ? 1 : 2;
}
#endif
}  // namespace

int simd_level() {
#if COMPACT_X86
  static const bool first = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
  static const bool second = __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  static const int detected = std::min(first ? (second ? 2 : 1) : 0, allowed());
#else
  static const int detected = 0;
#endif
  const int forced = forced_level.load(std::memory_order_relaxed);
  return forced >= 0 && forced < detected ? forced : detected;
}

void force_simd_level(int level) { forced_level.store(level); }

}  // namespace compact
