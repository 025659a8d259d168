#include "row_softmax.h"

#include "simd.h"

#if COMPACT_VECTORS

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "host_threads.h"
#include "lanes.h"

namespace compact {

namespace {

template <int kBytes>
COMPACT_INLINE float largest(const float* row, std::int64_t width) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  Lanes top[4] = {Lanes{} + lowest, Lanes{} + lowest, Lanes{} + lowest, Lanes{} + lowest};
  std::int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) top[k] = larger<kBytes>(load(row + j + k * kLanes), top[k]);
  float best = lowest;
  for (; j < width; ++j) best = row[j] > best ? row[j] : best;
  const Lanes all = larger<kBytes>(larger<kBytes>(top[0], top[1]), larger<kBytes>(top[2], top[3]));
  for (std::int64_t k = 0; k < kLanes; ++k) best = all[k] > best ? all[k] : best;
  return best;
}

// row becomes exp(row - top); sums of it, and of it times (row - top).
struct Sums {
  Lanes plain[4] = {};
  Lanes weighted[4] = {};
};

template <int kBytes, bool kWeighted>
COMPACT_INLINE Lanes exponentials(Lanes z, float top, Lanes& plain, Lanes& weighted) {
  const Lanes x = z - top, none = {};
  const Lanes e = where_below<kBytes>(x, kLowest + none, none, exp_of(x));
  plain += e;
  if (kWeighted) weighted += where_below<kBytes>(x, kLowest + none, none, e * x);  // -inf x 0 is not 0
  return e;
}

template <int kBytes, bool kWeighted, bool kStore>
COMPACT_INLINE void take_row(float* row, std::int64_t width, float top, float& total, float& more) {
  Sums s;
  std::int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      float* at = row + j + k * kLanes;
      const Lanes e = exponentials<kBytes, kWeighted>(load(at), top, s.plain[k], s.weighted[k]);
      if (kStore) store(at, e);
    }
  for (; j < width; j += kLanes) {  // the rest, filled up with what becomes 0
    const std::int64_t count = std::min(kLanes, width - j);
    Lanes v = Lanes{} - std::numeric_limits<float>::infinity();
    std::memcpy(&v, row + j, static_cast<std::size_t>(count) * sizeof(float));
    v = exponentials<kBytes, kWeighted>(v, top, s.plain[0], s.weighted[0]);
    if (kStore) std::memcpy(row + j, &v, static_cast<std::size_t>(count) * sizeof(float));
  }
  total = sum((s.plain[0] + s.plain[1]) + (s.plain[2] + s.plain[3]));
  more = kWeighted ? sum((s.weighted[0] + s.weighted[1]) + (s.weighted[2] + s.weighted[3])) : 0.0f;
}

struct Work {
  float* z;
  std::ptrdiff_t stride;
  std::int64_t n, width, first;
  const RunningRows& rows;
  float* shrink;
};

template <int kBytes>
COMPACT_INLINE void update(const Work& w, std::int64_t begin, std::int64_t end) {
  const RunningRows& rows = w.rows;
  for (std::int64_t i = begin; i < end; ++i) {
    float* row = w.z + i * w.stride;
    const float old = rows.peak[i];
    const std::int64_t at = rows.target[i] - w.first;
    const bool here = at >= 0 && at < w.width;
    float value = 0.0f;
    if (here) {
      rows.at_target[i] = value = row[at];
      row[at] = -std::numeric_limits<float>::infinity();
    }
    float top = largest<kBytes>(row, w.width);
    if (here && rows.weighted) {
      bool before = old >= value;
      if (top == value)
        for (std::int64_t j = 0; j < at && !before; ++j) before = row[j] == value;
      rows.preceded[i] |= before;
    }
    top = top > old ? top : old;
    const float by = std::exp(old - top);
    float total, more;
    const bool raw = i >= rows.raw_begin && i < rows.raw_end;
    if (rows.weighted) {
      raw ? take_row<kBytes, true, false>(row, w.width, top, total, more)
          : take_row<kBytes, true, true>(row, w.width, top, total, more);
      rows.weighted[i] = by * (rows.weighted[i] + (old - top) * rows.rest[i]) + more;
    } else {
      raw ? take_row<kBytes, false, false>(row, w.width, top, total, more)
          : take_row<kBytes, false, true>(row, w.width, top, total, more);
    }
    if (raw && here) row[at] = value;
    rows.rest[i] = rows.rest[i] * by + total;
    rows.peak[i] = top;
    w.shrink[i] = by;
  }
}

using Update = void (*)(const Work&, std::int64_t, std::int64_t);

void update_plain(const Work& w, std::int64_t begin, std::int64_t end) {
  update<16>(w, begin, end);
}

#if COMPACT_X86
__attribute__((target("avx2"))) void update_avx2(const Work& w, std::int64_t begin,
                                                 std::int64_t end) {
  update<32>(w, begin, end);
}

__attribute__((target("avx512f"))) void update_avx512(const Work& w, std::int64_t begin,
                                                      std::int64_t end) {
  update<64>(w, begin, end);
}
#endif

Update widest() {
#if COMPACT_X86
  if (simd_level() > 1) return update_avx512;
  if (simd_level() > 0) return update_avx2;
#endif
  return update_plain;
}

struct Shared {
  const Work& work;
  Update update;
};

void share(void* data, int part, int parts) {
  const Shared& s = *static_cast<Shared*>(data);
  s.update(s.work, s.work.n * part / parts, s.work.n * (part + 1) / parts);
}

}  // namespace

void update_rows(float* z, std::ptrdiff_t stride, std::int64_t n, std::int64_t width,
                 std::int64_t first, const RunningRows& rows, float* shrink, int threads) {
  const Work work{z, stride, n, width, first, rows, shrink};
  Shared shared{work, widest()};
  if (n * width < 1 << 15) threads = 1;  // too little to share
  on_host_threads(threads, share, &shared);
}

}  // namespace compact

#endif
