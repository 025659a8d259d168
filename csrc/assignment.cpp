#include "assignment.h"

#include <algorithm>
#include <limits>

#include "simd.h"

#if COMPACT_X86
#include <immintrin.h>
#endif

namespace compact {

namespace {

// Costs are -weight * kScale, so that a cost and its column share one integer: the minimum of
// cost + column is the cheapest column, the lowest of equals.
constexpr int kScaleBits = 6;
constexpr std::int64_t kVectorColumns = std::int64_t{1} << kScaleBits;

template <class T>
struct TwoBest {
  T first, second;
  std::int32_t first_at, second_at;
};

template <class T>
struct Nearest {
  T distance;
  std::int32_t at;
};

template <class T>
struct PlainScan {
  // The two cheapest columns of a row at the present prices.
  static TwoBest<T> two_best(const T* cost, const T* v, std::int64_t m) {
    constexpr T far = std::numeric_limits<T>::max();
    TwoBest<T> out{far, far, 0, 0};
    for (std::int64_t j = 0; j < m; ++j) {
      const T d = cost[j] - v[j];
      if (d < out.first) {
        out.second = out.first;
        out.second_at = out.first_at;
        out.first = d;
        out.first_at = static_cast<std::int32_t>(j);
      } else if (d < out.second) {
        out.second = d;
        out.second_at = static_cast<std::int32_t>(j);
      }
    }
    return out;
  }

  // One Dijkstra step: relax all open columns through `row` and return the nearest. closed is the
  // largest value for columns already reached, the smallest for open ones.
  static Nearest<T> relax(const T* cost, std::int64_t m, T base, const T* v, T* best,
                          std::int32_t* from, std::int32_t row, const std::int32_t* closed) {
    Nearest<T> out{std::numeric_limits<T>::max(), -1};
    for (std::int64_t j = 0; j < m; ++j) {
      if (closed[j] > 0) continue;
      const T d = base + cost[j] - v[j];
      if (d < best[j]) {
        best[j] = d;
        from[j] = row;
      }
      if (best[j] < out.distance) out = {best[j], static_cast<std::int32_t>(j)};
    }
    return out;
  }
};

#if COMPACT_X86

// The same by eight columns at once. Rows are padded to whole vectors with columns too dear to take.
struct VectorScan {
  COMPACT_TARGET_AVX2 static __m256i read(const std::int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  COMPACT_TARGET_AVX2 static void write(std::int32_t* p, __m256i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }

  COMPACT_TARGET_AVX2 static TwoBest<std::int32_t> two_best(const std::int32_t* cost,
                                                            const std::int32_t* v, std::int64_t m) {
    const __m256i eight = _mm256_set1_epi32(8);
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i first = _mm256_add_epi32(_mm256_sub_epi32(read(cost), read(v)), lane);
    __m256i second = _mm256_set1_epi32(std::numeric_limits<std::int32_t>::max());
    for (std::int64_t j = 8; j < m; j += 8) {
      lane = _mm256_add_epi32(lane, eight);
      const __m256i key = _mm256_add_epi32(_mm256_sub_epi32(read(cost + j), read(v + j)), lane);
      second = _mm256_min_epi32(second, _mm256_max_epi32(first, key));
      first = _mm256_min_epi32(first, key);
    }
    const auto fold = [](__m128i& a, __m128i& b, __m128i a2, __m128i b2) COMPACT_TARGET_AVX2 {
      b = _mm_min_epi32(_mm_min_epi32(b, b2), _mm_max_epi32(a, a2));
      a = _mm_min_epi32(a, a2);
    };
    __m128i a = _mm256_castsi256_si128(first), b = _mm256_castsi256_si128(second);
    fold(a, b, _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1));
    fold(a, b, _mm_shuffle_epi32(a, 0x4E), _mm_shuffle_epi32(b, 0x4E));
    fold(a, b, _mm_shuffle_epi32(a, 0xB1), _mm_shuffle_epi32(b, 0xB1));
    const std::int32_t x = _mm_cvtsi128_si32(a), y = _mm_cvtsi128_si32(b);
    constexpr std::int32_t low = kVectorColumns - 1;
    return {x & ~low, y & ~low, x & low, y & low};
  }

  COMPACT_TARGET_AVX2 static Nearest<std::int32_t> relax(const std::int32_t* cost, std::int64_t m,
                                                         std::int32_t base, const std::int32_t* v,
                                                         std::int32_t* best, std::int32_t* from,
                                                         std::int32_t row,
                                                         const std::int32_t* closed) {
    const __m256i bases = _mm256_set1_epi32(base), rows = _mm256_set1_epi32(row);
    const __m256i eight = _mm256_set1_epi32(8);
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i nearest = _mm256_set1_epi32(std::numeric_limits<std::int32_t>::max());
    for (std::int64_t j = 0; j < m; j += 8) {
      const __m256i d = _mm256_add_epi32(bases, _mm256_sub_epi32(read(cost + j), read(v + j)));
      const __m256i shut = read(closed + j);
      const __m256i old = read(best + j);
      // a closed column's distance is final: compare as if the offer were infinite
      const __m256i better = _mm256_cmpgt_epi32(old, _mm256_max_epi32(d, shut));
      const __m256i now = _mm256_blendv_epi8(old, d, better);
      write(best + j, now);
      write(from + j, _mm256_blendv_epi8(read(from + j), rows, better));
      nearest = _mm256_min_epi32(nearest, _mm256_max_epi32(_mm256_add_epi32(now, lane), shut));
      lane = _mm256_add_epi32(lane, eight);
    }
    __m128i a = _mm_min_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1));
    a = _mm_min_epi32(a, _mm_shuffle_epi32(a, 0x4E));
    a = _mm_min_epi32(a, _mm_shuffle_epi32(a, 0xB1));
    const std::int32_t x = _mm_cvtsi128_si32(a);
    constexpr std::int32_t low = kVectorColumns - 1;
    return {x & ~low, x & low};
  }
};

#endif

constexpr std::int64_t padded(std::int64_t m) { return (m + 7) / 8 * 8; }

// Larger than any sum of costs that the narrow path admits, and far from overflow.
template <class T>
constexpr T too_dear() {
  return std::numeric_limits<T>::max() / 4 & ~static_cast<T>(kVectorColumns - 1);
}

}  // namespace

template <class T>
void Assignment::load(const std::int32_t* weight, std::int64_t rows, std::int64_t columns,
                      Prices<T>& prices) {
  const std::int64_t n = std::min(rows, columns), m = std::max(rows, columns), stride = padded(m);
  prices.cost.resize(static_cast<std::size_t>(n * stride));
  constexpr T scale = -static_cast<T>(kVectorColumns);
  for (std::int64_t i = 0; i < n; ++i) {
    T* to = prices.cost.data() + i * stride;
    if (rows <= columns)
      for (std::int64_t j = 0; j < m; ++j) to[j] = scale * weight[i * columns + j];
    else
      for (std::int64_t j = 0; j < m; ++j) to[j] = scale * weight[j * columns + i];
    for (std::int64_t j = m; j < stride; ++j) to[j] = too_dear<T>();
  }
}

// n <= m: every row is assigned.
template <class T, class Scan>
void Assignment::search(std::int64_t n, std::int64_t m, Prices<T>& prices) {
  const std::int64_t stride = padded(m);
  prices.v.assign(static_cast<std::size_t>(stride), 0);
  prices.best.resize(static_cast<std::size_t>(stride));
  from_.resize(static_cast<std::size_t>(stride));
  closed_.resize(static_cast<std::size_t>(stride));
  row_of_.assign(static_cast<std::size_t>(m), -1);
  column_of_.resize(static_cast<std::size_t>(n));
  free_.resize(static_cast<std::size_t>(n));
  const T* cost = prices.cost.data();
  T *v = prices.v.data(), *best = prices.best.data();

  // Rows bid: a row raises the price of its best column until its second best is as good. A row that
  // is outbid bids again at once; after a tie it waits for the next round.
  std::int64_t left = n;
  for (std::int64_t i = 0; i < n; ++i) free_[i] = static_cast<std::int32_t>(i);
  for (int round = 0; round < 2 && left > 0 && m > 1; ++round) {
    std::int64_t at = 0, next = 0, bids = 8 * n;
    const std::int64_t count = left;
    while (at < count) {
      const std::int32_t i = free_[at++];
      const TwoBest<T> two = Scan::two_best(cost + i * stride, v, m);
      std::int32_t j = two.first_at;
      const bool strict = two.first < two.second;
      if (strict)
        v[j] -= two.second - two.first;
      else if (row_of_[j] >= 0)
        j = two.second_at;
      const std::int32_t outbid = row_of_[j];
      row_of_[j] = i;
      column_of_[i] = j;
      if (outbid < 0) continue;
      if (strict && --bids > 0)
        free_[--at] = outbid;
      else
        free_[next++] = outbid;
    }
    left = next;
  }

  for (std::int64_t f = 0; f < left; ++f) {
    const std::int32_t start = free_[f];
    std::fill(prices.best.begin(), prices.best.end(), too_dear<T>());
    std::fill(closed_.begin(), closed_.end(), std::numeric_limits<std::int32_t>::min());
    reached_.clear();
    T distance = 0;
    std::int32_t row = start, sink = -1;
    T base = 0;
    for (;;) {
      const Nearest<T> found =
          Scan::relax(cost + row * stride, m, base, v, best, from_.data(), row, closed_.data());
      distance = found.distance;
      closed_[found.at] = std::numeric_limits<std::int32_t>::max();
      if (row_of_[found.at] < 0) {
        sink = found.at;
        break;
      }
      reached_.push_back(found.at);
      row = row_of_[found.at];
      // the matched column of `row` has reduced cost 0
      base = distance - (cost[row * stride + found.at] - v[found.at]);
    }
    for (std::int32_t j : reached_) v[j] += best[j] - distance;
    for (std::int32_t j = sink;;) {
      const std::int32_t i = from_[j];
      row_of_[j] = i;
      std::int32_t next = -1;
      if (i != start) next = column_of_[i];
      column_of_[i] = j;
      if (i == start) break;
      j = next;
    }
  }
}

std::int64_t Assignment::loss(std::int64_t i, std::int64_t j) const {
  if (flipped_) std::swap(i, j);
  const auto reduced = [&](const auto& prices) -> std::int64_t {
    const auto* cost = prices.cost.data() + i * stride_;
    const std::int32_t taken = column_of_[i];
    return (cost[j] - prices.v[j]) - (cost[taken] - prices.v[taken]);
  };
  return (is_narrow_ ? reduced(narrow_) : reduced(wide_)) / kVectorColumns;
}

std::int64_t Assignment::loss_of_none(std::int64_t i) const {
  const auto price = [&](const auto& prices) -> std::int64_t {
    if (flipped_) return -std::int64_t{prices.v[i]};
    const std::int32_t taken = column_of_[i];
    return -std::int64_t{prices.cost[i * stride_ + taken] - prices.v[taken]};
  };
  return std::max<std::int64_t>(0, (is_narrow_ ? price(narrow_) : price(wide_)) / kVectorColumns);
}

std::int64_t Assignment::solve(const std::int32_t* weight, std::int64_t rows, std::int64_t columns,
                               std::int32_t* assigned) {
  if (assigned) std::fill(assigned, assigned + rows, -1);
  if (rows == 0 || columns == 0) return 0;
  const std::int64_t n = std::min(rows, columns), m = std::max(rows, columns);
  const std::int32_t largest = *std::max_element(weight, weight + n * m);
  is_narrow_ = std::int64_t{largest} * (n + 2) < (std::int64_t{1} << (28 - kScaleBits));
  flipped_ = rows > columns;
  stride_ = padded(m);
  if (is_narrow_) {
    load(weight, rows, columns, narrow_);
#if COMPACT_X86
    if (m <= kVectorColumns && simd_level() > 0)
      search<std::int32_t, VectorScan>(n, m, narrow_);
    else
#endif
      search<std::int32_t, PlainScan<std::int32_t>>(n, m, narrow_);
  } else {
    load(weight, rows, columns, wide_);
    search<std::int64_t, PlainScan<std::int64_t>>(n, m, wide_);
  }
  std::int64_t value = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t j = column_of_[i];
    const std::int64_t row = rows > columns ? j : i, column = rows > columns ? i : j;
    const std::int32_t gain = weight[row * columns + column];
    value += gain;
    if (assigned && gain > 0) assigned[row] = static_cast<std::int32_t>(column);
  }
  return value;
}

}  // namespace compact
