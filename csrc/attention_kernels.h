// The inner loops of attention for vectors of any width: small products, and scores to weights.
// For attention.cpp, which is compiled with contraction: products are fused with their sums.
//
// Scores lie with one query a lane: [keys, lanes]. Peaks and sums over keys are then taken without
// crossing lanes, and neither keys nor values need be packed for products.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.h"
#include "products.h"
#include "turn.h"

namespace compact {

constexpr std::int64_t kQueries = 32;  // lanes of a row of scores, in vectors of any width

// What each lane's query sees: keys from `first` to `last`, counted as the scores' rows are, as
// floats. Those in [all_begin, all_end) are seen by all.
struct Sight {
  alignas(64) float first[kQueries];
  alignas(64) float last[kQueries];
  std::int64_t all_begin, all_end;
};

template <class P>
COMPACT_INLINE typename P::Vector take(const float* p) {
  typename P::Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class P>
COMPACT_INLINE void put(float* p, typename P::Vector v) {
  std::memcpy(p, &v, sizeof v);
}

// c [R, W vectors] (+)= a b, for rows of b `next` apart.
template <class P, int R, int W>
COMPACT_INLINE void small_tile(const Factor& a, const float* b, std::ptrdiff_t next, std::int64_t k,
                               float* c, std::ptrdiff_t stride, bool add) {
  typedef typename P::Vector V;
  V sums[R][W] = {};
  const float* rows[(R + 3) / 4];  // every fourth: the others are reached by three distances
  for (int g = 0; g < (R + 3) / 4; ++g) rows[g] = a.data + 4 * g * a.row;
  const std::ptrdiff_t distance[4] = {0, a.row, 2 * a.row, 3 * a.row}, along = a.column;
#pragma GCC unroll 4
  for (std::int64_t t = 0; t < k; ++t) {
    V right[W];
#pragma GCC unroll 2
    for (int j = 0; j < W; ++j) right[j] = take<P>(b + j * P::kCount);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float x = rows[i / 4][distance[i % 4]];
#pragma GCC unroll 2
      for (int j = 0; j < W; ++j) sums[i][j] += x * right[j];
    }
    for (int g = 0; g < (R + 3) / 4; ++g) rows[g] += along;
    b += next;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < W; ++j) {
      float* at = c + i * stride + j * P::kCount;
      put<P>(at, add ? sums[i][j] + take<P>(at) : sums[i][j]);
    }
}

using SmallTile = void (*)(const Factor& a, const float* b, std::ptrdiff_t next, std::int64_t k,
                           float* c, std::ptrdiff_t stride, bool add);

// Rows of d to [d, kQueries], and unless `flat` is null to [kQueries, d].
template <class P>
COMPACT_INLINE void turn_queries(const float* const* rows, std::int64_t d, float* flat,
                                 float* turned) {
  constexpr std::int64_t n = P::kCount;
  for (std::int64_t i = 0; i < kQueries; i += n)
    for (std::int64_t j = 0; j < d; j += n) {
      typename P::Vector x[n];
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) x[k] = take<P>(rows[i + k] + j);
      if (flat != nullptr)
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) put<P>(flat + (i + k) * d + j, x[k]);
      turn<P>(x);
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) put<P>(turned + (j + k) * kQueries + i, x[k]);
    }
}

// The sum of each row's products with the other's.
template <class P>
COMPACT_INLINE void dots(const float* const* rows, const float* others, std::int64_t d,
                         float* sums) {
  constexpr std::int64_t n = P::kCount;
  for (std::int64_t i = 0; i < kQueries; i += n) {
    typename P::Vector x[n] = {};
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k)
      for (std::int64_t j = 0; j < d; j += n)
        x[k] += take<P>(rows[i + k] + j) * take<P>(others + (i + k) * d + j);
    turn<P>(x);
#pragma GCC unroll 4
    for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) x[k] += x[k + half];
    put<P>(sums + i, x[0]);
  }
}

// x where the lane sees the key, else `other`.
template <class P>
COMPACT_INLINE typename P::Vector where_seen(typename P::Vector x, std::int64_t key,
                                             const Sight& sight, std::int64_t lane,
                                             typename P::Vector other) {
  typedef typename P::Vector V;
  const V at = V{} + static_cast<float>(key);
  const V after = at - take<P>(sight.first + lane), before = take<P>(sight.last + lane) - at;
  const V inside = after < before ? after : before;  // one comparison: of two GCC makes a loop
  return inside < V{} ? other : x;
}

// exp of x <= 87; 0 below kLowest.
template <class P>
COMPACT_INLINE typename P::Vector exp_or_none(typename P::Vector x) {
  typedef typename P::Vector V;
  const V none = {};
  return x < none + kLowest ? none : exp_of_any<V, typename P::Ints>(x);
}

constexpr std::int64_t kSums = 4;  // that a lane's sum is made of

// Scores of keys [begin, end), multiples of kSums, become exp(scale * score - peak); the peak of each
// lane and the sum of what is left. Lanes from `lanes` on are left alone.
template <class P>
COMPACT_INLINE void weights(float* scores, std::int64_t begin, std::int64_t end, std::int64_t lanes,
                            const Sight& sight, float scale, float* peaks, float* totals) {
  typedef typename P::Vector V;
  const V lowest = V{} - std::numeric_limits<float>::infinity();
  for (std::int64_t lane = 0; lane < lanes; lane += P::kCount) {
    V tops[kSums], sums[kSums] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) tops[k] = lowest;
    float* at = scores + lane;
    for (std::int64_t j = begin; j < end; j += kSums, at += kSums * kQueries) {
      const bool all = j >= sight.all_begin && j + kSums <= sight.all_end;
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) {
        V x = take<P>(at + k * kQueries) * scale;
        if (!all) x = where_seen<P>(x, j + k, sight, lane, lowest);
        put<P>(at + k * kQueries, x);
        tops[k] = tops[k] < x ? x : tops[k];
      }
    }
    V peak = tops[0];
#pragma GCC unroll 4
    for (int k = 1; k < kSums; ++k) peak = peak < tops[k] ? tops[k] : peak;
    at = scores + lane;
    for (std::int64_t j = begin; j < end; j += kSums, at += kSums * kQueries)
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) {
        const V x = exp_or_none<P>(take<P>(at + k * kQueries) - peak);
        put<P>(at + k * kQueries, x);
        sums[k] += x;
      }
    put<P>(peaks + lane, peak);
    put<P>(totals + lane, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// Scores of keys [begin, end) become weights, and gradients by weights become those by scores.
template <class P>
COMPACT_INLINE void weights_back(float* scores, float* grads, std::int64_t begin, std::int64_t end,
                                 std::int64_t lanes, const Sight& sight, float scale,
                                 const float* logsumexp, const float* along) {
  typedef typename P::Vector V;
  const V none = {};
  for (std::int64_t j = begin; j < end; ++j) {
    const bool all = j >= sight.all_begin && j < sight.all_end;
    for (std::int64_t lane = 0; lane < lanes; lane += P::kCount) {
      float* at = scores + (j - begin) * kQueries + lane;
      float* grad = grads + (j - begin) * kQueries + lane;
      V x = exp_or_none<P>(take<P>(at) * scale - take<P>(logsumexp + lane));
      if (!all) x = where_seen<P>(x, j, sight, lane, none);
      put<P>(at, x);
      put<P>(grad, x * (take<P>(grad) - take<P>(along + lane)) * scale);
    }
  }
}

}  // namespace compact
