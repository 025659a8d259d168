#include "assignment.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "simd.h"

#if COMPACT_X86
#include <immintrin.h>
#endif

namespace compact {

namespace {
std::atomic<int> forced_level{-1};
}

int simd_level() {
#if COMPACT_X86
  static const int detected =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") ? 1 : 0;
#else
  static const int detected = 0;
#endif
  const int forced = forced_level.load(std::memory_order_relaxed);
  return forced >= 0 ? forced : detected;
}

void force_simd_level(int level) { forced_level.store(level); }

namespace {

// One Dijkstra step: relax all open columns through `row`, and return the nearest open column (the
// lowest of equals). `closed` is all ones for columns already reached.
template <class T>
std::int64_t relax(const std::int32_t* weight, std::int64_t m, T base, const T* v, T* best,
                   std::int32_t* from, std::int32_t row, const std::int32_t* closed) {
  T nearest = std::numeric_limits<T>::max();
  std::int64_t at = -1;
  for (std::int64_t j = 0; j < m; ++j) {
    if (closed[j]) continue;
    T d = base - v[j] - static_cast<T>(weight[j]);
    if (d < best[j]) {
      best[j] = d;
      from[j] = row;
    }
    if (best[j] < nearest) {
      nearest = best[j];
      at = j;
    }
  }
  return at;
}

#if COMPACT_X86
COMPACT_TARGET_AVX2 std::int64_t relax_avx2(const std::int32_t* weight, std::int64_t m,
                                            std::int32_t base, const std::int32_t* v,
                                            std::int32_t* best, std::int32_t* from,
                                            std::int32_t row, const std::int32_t* closed) {
  // v, best, from and closed are padded to whole vectors (closed columns); weight is not
  const __m256i far = _mm256_set1_epi32(std::numeric_limits<std::int32_t>::max());
  const __m256i bases = _mm256_set1_epi32(base), rows = _mm256_set1_epi32(row);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i nearest = far, at = _mm256_set1_epi32(-1);
  for (std::int64_t j = 0; j < m; j += 8) {
    __m256i w;
    if (j + 8 <= m) {
      w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + j));
    } else {
      __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(m - j)), lanes);
      w = _mm256_maskload_epi32(weight + j, inside);
    }
    __m256i vj = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + j));
    __m256i shut = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(closed + j));
    __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(best + j));
    __m256i f = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + j));
    __m256i d = _mm256_sub_epi32(_mm256_sub_epi32(bases, vj), w);
    __m256i better = _mm256_andnot_si256(shut, _mm256_cmpgt_epi32(b, d));
    b = _mm256_blendv_epi8(b, d, better);
    f = _mm256_blendv_epi8(f, rows, better);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(best + j), b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(from + j), f);
    __m256i open = _mm256_blendv_epi8(b, far, shut);
    __m256i closer = _mm256_cmpgt_epi32(nearest, open);
    nearest = _mm256_blendv_epi8(nearest, open, closer);
    at = _mm256_blendv_epi8(at, _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(j))), closer);
  }
  alignas(32) std::int32_t values[8], places[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(values), nearest);
  _mm256_store_si256(reinterpret_cast<__m256i*>(places), at);
  int lane = 0;
  for (int i = 1; i < 8; ++i)
    if (values[i] < values[lane] || (values[i] == values[lane] && places[i] < places[lane] &&
                                     places[i] >= 0) || places[lane] < 0)
      lane = i;
  return places[lane];
}

COMPACT_TARGET_AVX2 std::int64_t relax_best(const std::int32_t* w, std::int64_t m, std::int32_t base,
                                            const std::int32_t* v, std::int32_t* best,
                                            std::int32_t* from, std::int32_t row,
                                            const std::int32_t* closed, bool wide) {
  return wide ? relax_avx2(w, m, base, v, best, from, row, closed)
              : relax<std::int32_t>(w, m, base, v, best, from, row, closed);
}
#else
std::int64_t relax_best(const std::int32_t* w, std::int64_t m, std::int32_t base,
                        const std::int32_t* v, std::int32_t* best, std::int32_t* from,
                        std::int32_t row, const std::int32_t* closed, bool) {
  return relax<std::int32_t>(w, m, base, v, best, from, row, closed);
}
#endif

std::int64_t relax_best(const std::int32_t* w, std::int64_t m, std::int64_t base,
                        const std::int64_t* v, std::int64_t* best, std::int32_t* from,
                        std::int32_t row, const std::int32_t* closed, bool) {
  return relax<std::int64_t>(w, m, base, v, best, from, row, closed);
}

}  // namespace

// Costs are -weight; rows <= columns, so every row is assigned.
template <class T>
void Assignment::search(const std::int32_t* weight, std::int64_t n, std::int64_t m, Duals<T>& duals) {
  const std::int64_t padded = (m + 7) / 8 * 8;
  const bool wide = simd_level() > 0;
  duals.u.assign(static_cast<std::size_t>(n), 0);
  duals.v.assign(static_cast<std::size_t>(padded), 0);
  duals.best.resize(static_cast<std::size_t>(padded));
  from_.resize(static_cast<std::size_t>(padded));
  closed_.resize(static_cast<std::size_t>(padded));
  row_of_.assign(static_cast<std::size_t>(m), -1);
  column_of_.assign(static_cast<std::size_t>(n), -1);
  T *u = duals.u.data(), *v = duals.v.data(), *best = duals.best.data();

  // each row takes its best column where that is free; the others search
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t* row = weight + i * m;
    std::int32_t high = row[0];
    for (std::int64_t j = 1; j < m; ++j) high = std::max(high, row[j]);
    u[i] = -static_cast<T>(high);
    for (std::int64_t j = 0; j < m; ++j) {
      if (row[j] == high && row_of_[j] < 0) {
        row_of_[j] = static_cast<std::int32_t>(i);
        column_of_[i] = static_cast<std::int32_t>(j);
        break;
      }
    }
  }
  for (std::int64_t start = 0; start < n; ++start) {
    if (column_of_[start] >= 0) continue;
    std::fill(duals.best.begin(), duals.best.end(), std::numeric_limits<T>::max());
    std::fill(closed_.begin(), closed_.begin() + m, 0);
    std::fill(closed_.begin() + m, closed_.end(), -1);
    reached_.clear();
    T distance = 0;
    auto row = static_cast<std::int32_t>(start);
    std::int64_t sink = -1;
    for (;;) {
      const std::int64_t j = relax_best(weight + row * m, m, distance - u[row], v, best,
                                        from_.data(), row, closed_.data(), wide);
      distance = best[j];
      closed_[j] = -1;
      if (row_of_[j] < 0) {
        sink = j;
        break;
      }
      reached_.push_back(static_cast<std::int32_t>(j));
      row = row_of_[j];
    }
    u[start] += distance;
    for (std::int32_t j : reached_) {
      const T change = distance - best[j];
      u[row_of_[j]] += change;
      v[j] -= change;
    }
    for (std::int64_t j = sink;;) {
      const std::int32_t i = from_[j];
      row_of_[j] = i;
      const std::int32_t next = column_of_[i];
      column_of_[i] = static_cast<std::int32_t>(j);
      if (i == start) break;
      j = next;
    }
  }
}

std::int64_t Assignment::solve(const std::int32_t* weight, std::int64_t rows, std::int64_t columns,
                               std::int32_t* assigned) {
  if (assigned) std::fill(assigned, assigned + rows, -1);
  if (rows == 0 || columns == 0) return 0;
  const bool transposed = rows > columns;
  const std::int64_t n = std::min(rows, columns), m = std::max(rows, columns);
  const std::int32_t* w = weight;
  if (transposed) {
    flipped_.resize(static_cast<std::size_t>(n * m));
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) flipped_[j * m + i] = weight[i * columns + j];
    w = flipped_.data();
  }
  const std::int32_t largest = *std::max_element(w, w + n * m);
  if (std::int64_t{largest} * (n + 2) < (std::int64_t{1} << 30))
    search<std::int32_t>(w, n, m, narrow_);
  else
    search<std::int64_t>(w, n, m, wide_);
  std::int64_t value = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t j = column_of_[i];
    const std::int32_t gain = w[i * m + j];
    value += gain;
    if (!assigned || gain == 0) continue;
    if (transposed)
      assigned[j] = static_cast<std::int32_t>(i);
    else
      assigned[i] = j;
  }
  return value;
}

}  // namespace compact
