// The inner loops of a product, for AVX-512: a tile of c whose sums stay in registers, and packing for
// it. For products.cpp, which is compiled with contraction: every product is fused with its sum.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "lanes.h"
#include "room.h"
#include "simd.h"
#include "turn.h"

namespace compact {

#define COMPACT_AVX512 __attribute__((target("avx512f")))

constexpr std::int64_t kSteps = 8;  // terms between two fetches

// Tiles of up to so many rows by two vectors: 28 of the 32 registers hold sums.
constexpr int kRows = 14;
constexpr std::int64_t kStrip = 2 * kLanes;

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
    const std::int64_t lines = rows > 0 ? rows * parts_of(width, kLine) : 0;
    each = lines / std::max<std::int64_t>(1, calls) + 1;
  }
};

// c [R, 2 vectors] (+)= a b; a's entries k apart by `along`, rows by `across`; b's rows by `next`.
template <int R>
COMPACT_INLINE void tile(const float* a, std::ptrdiff_t across, std::ptrdiff_t along,
                         const float* b, std::ptrdiff_t next, std::int64_t k, float* c,
                         std::ptrdiff_t stride, bool add, Ahead& ahead) {
  Lanes sums[R][2] = {};
  const float* rows[(R + 3) / 4];  // every fourth: the others are reached by three distances
  for (int g = 0; g < (R + 3) / 4; ++g) rows[g] = a + 4 * g * across;
  const std::ptrdiff_t distance[4] = {0, across, 2 * across, 3 * across};
  const auto step = [&]() __attribute__((always_inline)) {
    const Lanes left = load(b), right = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float x = rows[i / 4][distance[i % 4]];
      sums[i][0] += x * left;
      sums[i][1] += x * right;
    }
    for (int g = 0; g < (R + 3) / 4; ++g) rows[g] += along;
    b += next;
  };
  Ahead own{c, stride, R, kStrip, 0};
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
      float* at = c + i * stride + j * kLanes;
      store(at, add ? sums[i][j] + load(at) : sums[i][j]);
    }
}

// A strip of b from its columns, `apart`, each of which lies together.
COMPACT_AVX512 inline void pack_columns(const float* from, std::ptrdiff_t apart, std::int64_t k,
                                        float* to) {
  for (std::int64_t half = 0; half < kStrip; half += kLanes) {
    std::int64_t t = 0;
    for (; t + kLanes <= k; t += kLanes) {
      Lanes x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) x[i] = load(from + (half + i) * apart + t);
      turn<Part<sizeof(Lanes)>>(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (t + i) * kStrip + half, x[i]);
    }
    for (; t < k; ++t)
      for (int i = 0; i < kLanes; ++i) to[t * kStrip + half + i] = from[(half + i) * apart + t];
  }
}

// k pieces of one or two vectors, `apart`, one behind another: a panel of a, or a strip of b.
template <int kVectors>
COMPACT_AVX512 void pack_rows(const float* from, std::ptrdiff_t apart, std::int64_t k, float* to) {
  for (std::int64_t t = 0; t < k; ++t)
    for (int i = 0; i < kVectors; ++i)
      store(to + (t * kVectors + i) * kLanes, load(from + t * apart + i * kLanes));
}

using Tile = void (*)(const float* a, std::ptrdiff_t apart, const float* b, std::ptrdiff_t next,
                      std::int64_t k, float* c, std::ptrdiff_t stride, bool add, Ahead& ahead);

// Rows of a, or its columns, `apart`, each of which lies together.
template <bool kColumns, int R>
COMPACT_AVX512 void tile_of(const float* a, std::ptrdiff_t apart, const float* b,
                            std::ptrdiff_t next, std::int64_t k, float* c, std::ptrdiff_t stride,
                            bool add, Ahead& ahead) {
  tile<R>(a, kColumns ? 1 : apart, kColumns ? apart : 1, b, next, k, c, stride, add, ahead);
}

// By the number of rows, less 1.
template <bool kColumns, int... I>
const Tile* tiles_of(std::integer_sequence<int, I...>) {
  static const Tile all[] = {tile_of<kColumns, I + 1>...};
  return all;
}

}  // namespace compact
