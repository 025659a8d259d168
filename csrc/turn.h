// Squares of floats, transposed in registers.
#pragma once

#include <cstddef>
#include <utility>

#include "lanes.h"

namespace compact {

#if defined(__clang__) || __GNUC__ >= 12
#define COMPACT_SHUFFLEVECTOR 1
#else  // what older GCCs have, and clang has not
#define COMPACT_SHUFFLEVECTOR 0
#endif

// The first halves of a and b entry by entry, or the second halves: those from entry kFrom on.
template <class P, int kFrom, std::size_t... I>
COMPACT_INLINE typename P::Vector zip(typename P::Vector a, typename P::Vector b,
                                      std::index_sequence<I...>) {
  constexpr int n = static_cast<int>(P::kCount);
#if COMPACT_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b,
                                 (kFrom + static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * n)...);
#else
  return __builtin_shuffle(a, b,
                           typename P::Ints{(kFrom + static_cast<int>(I) / 2 +
                                             static_cast<int>(I) % 2 * n)...});
#endif
}

// x, as many vectors as each has entries: rows become columns.
template <class P>
COMPACT_INLINE void turn(typename P::Vector* x) {
  constexpr int n = static_cast<int>(P::kCount);
  using Order = std::make_index_sequence<static_cast<std::size_t>(n)>;
  typename P::Vector y[n];
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = zip<P, 0>(x[i], x[i + n / 2], Order{});
      y[2 * i + 1] = zip<P, n / 2>(x[i], x[i + n / 2], Order{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
}

}  // namespace compact
