#include "bounds.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

#if COMPACT_X86
#include <immintrin.h>
#endif

namespace compact {

// List by list, a neighbour's row at a time: no entry is looked up once for every pair of neighbours.
void Bounds::plain(const std::int32_t* s, std::int64_t rows, std::int64_t columns,
                   const Neighbours& a, const Neighbours& b, const std::int64_t* half,
                   const std::int64_t* settled, int fine, std::int32_t* out) {
  const auto size = static_cast<std::size_t>(rows * columns);
  if (settled)
    wide_total_.assign(settled, settled + size);
  else
    wide_total_.assign(size, 0);
  best_.resize(std::max(best_.size(), size));
  row_best_.resize(static_cast<std::size_t>(columns));
  row_sum_.resize(static_cast<std::size_t>(columns));
  for (int list = 0; list < kLists; ++list) {
    if (a.longest(list) == 0 || b.longest(list) == 0) continue;
    for (std::int64_t k = 0; k < rows; ++k) {  // best_[k][j]: among the neighbours of j
      const std::int32_t* from = s + k * columns;
      for (std::int64_t j = 0; j < columns; ++j) {
        std::int32_t best = 0;
        for (const std::int32_t *l = b.begin(j, list), *end = b.end(j, list); l != end; ++l)
          best = std::max(best, from[*l]);
        best_[static_cast<std::size_t>(k * columns + j)] = best;
      }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int32_t *k0 = a.begin(i, list), *k1 = a.end(i, list);
      if (k0 == k1) continue;
      std::fill(row_best_.begin(), row_best_.end(), 0);  // [l]: among the neighbours of i
      std::fill(row_sum_.begin(), row_sum_.end(), 0);    // [j]: best_ over the neighbours of i
      for (const std::int32_t* k = k0; k != k1; ++k) {
        const std::int32_t *row = s + *k * columns, *best = best_.data() + *k * columns;
        for (std::int64_t j = 0; j < columns; ++j) {
          row_best_[j] = std::max(row_best_[j], row[j]);
          row_sum_[j] += best[j];
        }
      }
      for (std::int64_t j = 0; j < columns; ++j) {
        std::int64_t right = 0;
        for (const std::int32_t *l = b.begin(j, list), *end = b.end(j, list); l != end; ++l)
          right += row_best_[*l];
        wide_total_[i * columns + j] += half[list / 2] * std::min(row_sum_[j], right);
      }
    }
  }
  const int shift = kShift - fine;
  for (std::size_t at = 0; at < size; ++at) {
    const std::int64_t mine = s[at];
    const std::int64_t extra = (mine * wide_total_[at] + (std::int64_t{1} << shift) - 1) >> shift;
    out[at] = static_cast<std::int32_t>((mine << fine) + extra);
  }
}

#if COMPACT_X86

namespace {

constexpr std::int64_t padded(std::int64_t n) { return (n + 7) / 8 * 8; }

COMPACT_TARGET_AVX2 __m256i read(const std::int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
COMPACT_TARGET_AVX2 void write(std::int32_t* p, __m256i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}

// to[columns][rows] = from[rows][columns] turned; both counts are multiples of 8.
COMPACT_TARGET_AVX2 void turn(const std::int32_t* from, std::int64_t rows, std::int64_t columns,
                              std::int32_t* to) {
  for (std::int64_t i = 0; i < rows; i += 8) {
    for (std::int64_t j = 0; j < columns; j += 8) {
      const std::int32_t* f = from + i * columns + j;
      std::int32_t* t = to + j * rows + i;
      __m256i r[8], q[8];
      for (int k = 0; k < 8; ++k) r[k] = read(f + k * columns);
      for (int k = 0; k < 8; k += 2) {
        q[k] = _mm256_unpacklo_epi32(r[k], r[k + 1]);
        q[k + 1] = _mm256_unpackhi_epi32(r[k], r[k + 1]);
      }
      for (int k = 0; k < 8; k += 4) {
        r[k] = _mm256_unpacklo_epi64(q[k], q[k + 2]);
        r[k + 1] = _mm256_unpackhi_epi64(q[k], q[k + 2]);
        r[k + 2] = _mm256_unpacklo_epi64(q[k + 1], q[k + 3]);
        r[k + 3] = _mm256_unpackhi_epi64(q[k + 1], q[k + 3]);
      }
      for (int k = 0; k < 4; ++k) {
        write(t + k * rows, _mm256_permute2x128_si256(r[k], r[k + 4], 0x20));
        write(t + (k + 4) * rows, _mm256_permute2x128_si256(r[k], r[k + 4], 0x31));
      }
    }
  }
}

// to[v] = largest, or sum, over the neighbours w of v of from[w], row by row of `width`.
template <bool kSum>
COMPACT_TARGET_AVX2 void gather(const Neighbours& of, int list, std::int64_t count,
                                const std::int32_t* from, std::int64_t width, std::int32_t* to) {
  for (std::int64_t v = 0; v < count; ++v, to += width) {
    const std::int32_t *w = of.begin(v, list), *end = of.end(v, list);
    if (w == end) {
      std::memset(to, 0, static_cast<std::size_t>(width) * sizeof *to);
      continue;
    }
    for (std::int64_t x = 0; x < width; x += 8) {
      __m256i all = read(from + *w * width + x);
      for (const std::int32_t* next = w + 1; next != end; ++next) {
        const __m256i other = read(from + *next * width + x);
        all = kSum ? _mm256_add_epi32(all, other) : _mm256_max_epi32(all, other);
      }
      write(to + x, all);
    }
  }
}

// total += h * min(left, right)
COMPACT_TARGET_AVX2 void join(std::int32_t* total, const std::int32_t* left,
                              const std::int32_t* right, std::int64_t size, std::int64_t h) {
  const __m256i times = _mm256_set1_epi32(static_cast<std::int32_t>(h));
  for (std::int64_t x = 0; x < size; x += 8) {
    const __m256i least = _mm256_min_epi32(read(left + x), read(right + x));
    write(total + x, _mm256_add_epi32(read(total + x), _mm256_mullo_epi32(least, times)));
  }
}

// (s << fine) + ((s * total) >> shift), rounded up, into a row of out; the last vector by way of a
// buffer, for out is not padded.
COMPACT_TARGET_AVX2 void finish(const std::int32_t* s, const std::int32_t* total,
                                std::int64_t columns, int fine, std::int32_t* out) {
  const int shift = kShift - fine;
  const __m256i up = _mm256_set1_epi64x((std::int64_t{1} << shift) - 1);
  for (std::int64_t x = 0; x < columns; x += 8) {
    const __m256i mine = read(s + x), sum = read(total + x);
    const __m256i even = _mm256_srli_epi64(_mm256_add_epi64(_mm256_mul_epu32(mine, sum), up), shift);
    const __m256i odd = _mm256_srli_epi64(
        _mm256_add_epi64(
            _mm256_mul_epu32(_mm256_srli_epi64(mine, 32), _mm256_srli_epi64(sum, 32)), up),
        shift);
    const __m256i extra = _mm256_or_si256(even, _mm256_slli_epi64(odd, 32));
    const __m256i value = _mm256_add_epi32(_mm256_slli_epi32(mine, fine), extra);
    if (x + 8 <= columns) {
      write(out + x, value);
    } else {
      std::int32_t last[8];
      write(last, value);
      std::memcpy(out + x, last, static_cast<std::size_t>(columns - x) * sizeof *last);
    }
  }
}

}  // namespace

// The same for whole rows: best_ is [k][j], the best S_kl among the neighbours l of j; sum_ adds it
// up over the neighbours k of i. The turned arrays do it for the other side.
COMPACT_TARGET_AVX2 void Bounds::vector(const std::int32_t* s, std::int64_t rows,
                                        std::int64_t columns, const Neighbours& a,
                                        const Neighbours& b, const std::int64_t* half,
                                        const std::int64_t* settled, int fine, std::int32_t* out) {
  const std::int64_t n = padded(rows), m = padded(columns), size = n * m;
  for (auto* array : {&s_, &turned_, &best_, &best_turned_, &sum_, &sum_turned_, &total_})
    if (static_cast<std::int64_t>(array->size()) < size) array->resize(static_cast<std::size_t>(size));
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(s_.data() + i * m, s + i * columns,
                static_cast<std::size_t>(columns) * sizeof *s);
    std::int32_t* row = total_.data() + i * m;
    if (settled == nullptr) continue;
    for (std::int64_t j = 0; j < columns; ++j)
      row[j] = static_cast<std::int32_t>(settled[i * columns + j]);
  }
  if (settled == nullptr)
    std::memset(total_.data(), 0, static_cast<std::size_t>(rows * m) * sizeof *out);
  turn(s_.data(), n, m, turned_.data());
  for (int list = 0; list < kLists; ++list) {
    if (a.longest(list) == 0 || b.longest(list) == 0) continue;
    gather<false>(b, list, columns, turned_.data(), n, best_turned_.data());
    turn(best_turned_.data(), m, n, best_.data());
    gather<true>(a, list, rows, best_.data(), m, sum_.data());
    gather<false>(a, list, rows, s_.data(), m, best_.data());
    turn(best_.data(), n, m, best_turned_.data());
    gather<true>(b, list, columns, best_turned_.data(), n, sum_turned_.data());
    turn(sum_turned_.data(), m, n, best_.data());
    join(total_.data(), sum_.data(), best_.data(), rows * m, half[list / 2]);
  }
  for (std::int64_t i = 0; i < rows; ++i)
    finish(s_.data() + i * m, total_.data() + i * m, columns, fine, out + i * columns);
}

#else

void Bounds::vector(const std::int32_t* s, std::int64_t rows, std::int64_t columns,
                    const Neighbours& a, const Neighbours& b, const std::int64_t* half,
                    const std::int64_t* settled, int fine, std::int32_t* out) {
  plain(s, rows, columns, a, b, half, settled, fine, out);
}

#endif

void Bounds::compute(const std::int32_t* s, std::int64_t rows, std::int64_t columns,
                     const Neighbours& a, const Neighbours& b, const std::int64_t* half,
                     const std::int64_t* settled, bool narrow, int fine, std::int32_t* out) {
  if (rows == 0 || columns == 0) return;
  (this->*(narrow && simd_level() > 0 ? &Bounds::vector : &Bounds::plain))(
      s, rows, columns, a, b, half, settled, fine, out);
}

}  // namespace compact
