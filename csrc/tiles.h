// The inner loops of a product: a tile of c whose sums stay in registers, and packing for it. One set
// for AVX-512 and one for AVX2 with FMA; both add up in the same order and fuse every product with its
// sum, so they make the same bits. For products.cpp, which is compiled with contraction.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "lanes.h"
#include "simd.h"

namespace compact {

constexpr std::int64_t kSteps = 8;  // terms between two fetches
constexpr std::int64_t kLine = 16;  // floats of a cache line

// What a processor's registers allow: tiles of up to kRows rows by two vectors, the sums of which
// stay in registers.
struct Avx512 {
  typedef float Vector __attribute__((vector_size(64)));
  static constexpr int kRows = 14;
};
struct Avx2 {
  typedef float Vector __attribute__((vector_size(32)));
  static constexpr int kRows = 6;
};

template <class Machine>
constexpr std::int64_t kVector = sizeof(typename Machine::Vector) / sizeof(float);
template <class Machine>
constexpr std::int64_t kStrip = 2 * kVector<Machine>;  // columns of a tile

// Memory that will be wanted soon, fetched line by line while tiles are at work.
struct Ahead {
  const float* row = nullptr;
  std::ptrdiff_t stride = 0;
  std::int64_t rows = 0, width = 0, column = 0;
  std::int64_t each = 1;  // lines at a time

  COMPACT_INLINE void fetch() {
    for (std::int64_t i = 0; i < each && rows > 0; ++i) {
      __builtin_prefetch(row + column, 0, 2);
      column += kLine;
      if (column >= width) {
        column = 0;
        row += stride;
        --rows;
      }
    }
  }

  // So that all is there after so many calls.
  void spread_over(std::int64_t calls) {
    const std::int64_t lines = rows > 0 ? rows * ((width + kLine - 1) / kLine) : 0;
    each = lines / std::max<std::int64_t>(1, calls) + 1;
  }
};

// c [R, 2 vectors] (+)= a b; a's entries k apart by `along`, rows by `across`; b's rows by `next`.
template <class Machine, int R>
COMPACT_INLINE void tile(const float* a, std::ptrdiff_t across, std::ptrdiff_t along,
                         const float* b, std::ptrdiff_t next, std::int64_t k, float* c,
                         std::ptrdiff_t stride, bool add, Ahead& ahead) {
  typedef typename Machine::Vector Vector;
  constexpr std::int64_t v = kVector<Machine>;
  Vector sums[R][2] = {};
  const float* rows[(R + 3) / 4];  // every fourth: the others are reached by three distances
  for (int g = 0; g < (R + 3) / 4; ++g) rows[g] = a + 4 * g * across;
  const std::ptrdiff_t distance[4] = {0, across, 2 * across, 3 * across};
  const auto step = [&]() __attribute__((always_inline)) {
    Vector left, right;
    std::memcpy(&left, b, sizeof left);
    std::memcpy(&right, b + v, sizeof right);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float x = rows[i / 4][distance[i % 4]];
      sums[i][0] += x * left;
      sums[i][1] += x * right;
    }
    for (int g = 0; g < (R + 3) / 4; ++g) rows[g] += along;
    b += next;
  };
  Ahead own{c, stride, R, 2 * v, 0};
  std::int64_t t = 0;
  for (; t + kSteps <= k; t += kSteps) {
    ahead.fetch();
    own.fetch();
#pragma GCC unroll 8
    for (int u = 0; u < kSteps; ++u) step();
  }
  for (; t < k; ++t) step();
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* at = c + i * stride + j * v;
      if (add) {
        Vector old;
        std::memcpy(&old, at, sizeof old);
        sums[i][j] += old;
      }
      std::memcpy(at, &sums[i][j], sizeof(Vector));
    }
}

// In vectors: the first halves of a and b entry by entry, or the second halves.
template <class Vector, int kFrom, std::size_t... I>
COMPACT_INLINE Vector zip(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shufflevector(
      a, b, (kFrom + static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * int{sizeof...(I)})...);
}

// b [k, strip] of rows of k: `from` has the strip's entries `apart`, each followed by its k.
template <class Machine>
COMPACT_INLINE void transpose(const float* from, std::ptrdiff_t apart, std::int64_t k, float* to) {
  typedef typename Machine::Vector Vector;
  constexpr std::int64_t v = kVector<Machine>, strip = kStrip<Machine>;
  using Order = std::make_index_sequence<static_cast<std::size_t>(v)>;
  for (std::int64_t half = 0; half < strip; half += v) {
    std::int64_t t = 0;
    for (; t + v <= k; t += v) {
      Vector x[v], y[v];
#pragma GCC unroll 16
      for (int i = 0; i < v; ++i) std::memcpy(&x[i], from + (half + i) * apart + t, sizeof(Vector));
#pragma GCC unroll 4
      for (std::int64_t stage = 1; stage < v; stage *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < v / 2; ++i) {
          y[2 * i] = zip<Vector, 0>(x[i], x[i + v / 2], Order{});
          y[2 * i + 1] = zip<Vector, static_cast<int>(v / 2)>(x[i], x[i + v / 2], Order{});
        }
#pragma GCC unroll 16
        for (int i = 0; i < v; ++i) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < v; ++i) std::memcpy(to + (t + i) * strip + half, &x[i], sizeof(Vector));
    }
    for (; t < k; ++t)
      for (int i = 0; i < v; ++i) to[t * strip + half + i] = from[(half + i) * apart + t];
  }
}

using Tile = void (*)(const float* a, std::ptrdiff_t apart, const float* b, std::ptrdiff_t next,
                      std::int64_t k, float* c, std::ptrdiff_t stride, bool add, Ahead& ahead);
// k pieces of so many floats, `apart` from one to the next, put one behind another.
template <std::int64_t size>
COMPACT_INLINE void collect(const float* from, std::ptrdiff_t apart, std::int64_t k, float* to) {
  for (std::int64_t t = 0; t < k; ++t) std::memcpy(to + t * size, from + t * apart, size * sizeof(float));
}

using Pack = void (*)(const float* from, std::ptrdiff_t apart, std::int64_t k, float* to);

// What is compiled for one kind of processor.
struct Kernels {
  std::int64_t rows, strip;  // of the largest tile
  const Tile* of_rows;       // by the number of rows less 1; a's rows lie `apart`, their k together
  const Tile* of_columns;    // a's k lie `apart`, the rows' entries together
  // a strip of b from its columns, `apart`, or from its rows; a panel of a from its columns
  Pack transpose, collect_strip, collect_panel;
};

#define COMPACT_KERNELS(Machine, instructions)                                                     \
  template <int R>                                                                                 \
  __attribute__((target(instructions))) void rows_##Machine(                                       \
      const float* a, std::ptrdiff_t apart, const float* b, std::ptrdiff_t next,                   \
      std::int64_t k, float* c, std::ptrdiff_t stride, bool add, Ahead& ahead) {                   \
    tile<Machine, R>(a, apart, 1, b, next, k, c, stride, add, ahead);                              \
  }                                                                                                \
  template <int R>                                                                                 \
  __attribute__((target(instructions))) void columns_##Machine(                                    \
      const float* a, std::ptrdiff_t apart, const float* b, std::ptrdiff_t next,                   \
      std::int64_t k, float* c, std::ptrdiff_t stride, bool add, Ahead& ahead) {                   \
    tile<Machine, R>(a, 1, apart, b, next, k, c, stride, add, ahead);                              \
  }                                                                                                \
  __attribute__((target(instructions))) inline void transpose_##Machine(                                  \
      const float* from, std::ptrdiff_t apart, std::int64_t k, float* to) {                        \
    transpose<Machine>(from, apart, k, to);                                                        \
  }                                                                                                \
  __attribute__((target(instructions))) inline void strip_##Machine(                                      \
      const float* from, std::ptrdiff_t apart, std::int64_t k, float* to) {                        \
    collect<kStrip<Machine>>(from, apart, k, to);                                                  \
  }                                                                                                \
  __attribute__((target(instructions))) inline void panel_##Machine(                                      \
      const float* from, std::ptrdiff_t apart, std::int64_t k, float* to) {                        \
    collect<kVector<Machine>>(from, apart, k, to);                                                 \
  }                                                                                                \
  template <int... I>                                                                              \
  inline Kernels kernels_##Machine(std::integer_sequence<int, I...>) {                                    \
    static const Tile of_rows[] = {rows_##Machine<I + 1>...};                                      \
    static const Tile of_columns[] = {columns_##Machine<I + 1>...};                                \
    return {Machine::kRows, kStrip<Machine>, of_rows, of_columns, transpose_##Machine,             \
            strip_##Machine, panel_##Machine};                                                     \
  }

COMPACT_KERNELS(Avx512, "avx512f")
COMPACT_KERNELS(Avx2, "avx2,fma")

inline Kernels widest() {
  return simd_level() > 1 ? kernels_Avx512(std::make_integer_sequence<int, Avx512::kRows>{})
                          : kernels_Avx2(std::make_integer_sequence<int, Avx2::kRows>{});
}

}  // namespace compact
