#include "pairs.h"

#include "simd.h"

#if COMPACT_VECTORS

#include <algorithm>
#include <limits>
#include <vector>

#include "host_threads.h"
#include "lanes.h"

namespace compact {

namespace {

constexpr std::int64_t kChunk = 4096;  // columns of one task; sums are taken within it

// A row's logsumexp in two floats: where the logit is near the first, the difference is exact.
struct Shift {
  float high, low;
  explicit Shift(double value = 0.0)
      : high(static_cast<float>(value)), low(static_cast<float>(value - high)) {}
};

struct Work {
  const RowSets& sets;
  std::vector<std::int64_t> cu_pairs;  // where a set's matrix begins
  std::int64_t chunks;
  double* parts = nullptr;  // [chunks] of every entry, or null: gradients are asked for
  const float* constant = nullptr;
  const float* c = nullptr;
};

// log p and p of a row's columns j .. j + count; what lies behind them counts for nothing.
template <int kBytes>
COMPACT_INLINE void probabilities(const float* row, std::int64_t count, Shift shift, Lanes& a,
                                  Lanes& p) {
  constexpr float least = -1e30f;  // for -inf: differences of two of them are 0
  const Lanes none = {};
  Lanes z = none - std::numeric_limits<float>::infinity();
  if (count >= kLanes)
    z = load(row);
  else
    std::memcpy(&z, row, static_cast<std::size_t>(count) * sizeof(float));
  a = (z - shift.high) - shift.low;
  a = where_below<kBytes>(a, least + none, least + none, a);  // NaN stays NaN
  p = where_below<kBytes>(a, kLowest + none, none, exp_of(a));
}

// kSize: rows in the set, or 0 for any number.
template <int kBytes, int kSize>
COMPACT_INLINE void take_chunk(const Work& w, std::int64_t set, std::int64_t chunk) {
  const RowSets& s = w.sets;
  const std::int64_t first = s.cu[set];
  const std::int64_t size = kSize ? kSize : s.cu[set + 1] - first;
  constexpr std::int64_t most = kSize ? kSize : kMostCompared;
  float* row[most];
  Shift shift[most];
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t at = s.members[first + i];
    row[i] = s.z + at * s.stride;
    shift[i] = Shift(s.logsumexp[at]);
  }
  const std::int64_t begin = chunk * kChunk, end = std::min(s.width, begin + kChunk);
  Lanes a[most], p[most];
  if (w.parts) {
    Lanes total[most * most] = {};
    for (std::int64_t col = begin; col < end; col += kLanes) {
      for (std::int64_t i = 0; i < size; ++i)
        probabilities<kBytes>(row[i] + col, end - col, shift[i], a[i], p[i]);
      for (std::int64_t i = 0; i < size; ++i)
        for (std::int64_t j = 0; j < size; ++j)
          if (i != j) total[i * size + j] += p[i] * (a[i] - a[j]);
    }
    for (std::int64_t e = 0; e < size * size; ++e)
      w.parts[(w.cu_pairs[set] + e) * w.chunks + chunk] = sum(total[e]);
    return;
  }
  const float* constant = w.constant + first;
  const float* c = w.c + w.cu_pairs[set];
  for (std::int64_t col = begin; col < end; col += kLanes) {
    for (std::int64_t i = 0; i < size; ++i)
      probabilities<kBytes>(row[i] + col, end - col, shift[i], a[i], p[i]);
    for (std::int64_t i = 0; i < size; ++i) {
      Lanes slope = Lanes{} + constant[i], rise = {};
      for (std::int64_t j = 0; j < size; ++j) {
        if (i == j) continue;
        slope += c[i * size + j] * (a[i] - a[j]);
        rise += c[i * size + j] * (p[i] - p[j]);
      }
      const Lanes g = p[i] * slope + rise;
      if (end - col >= kLanes)
        store(row[i] + col, g);
      else
        std::memcpy(row[i] + col, &g, static_cast<std::size_t>(end - col) * sizeof(float));
    }
  }
}

template <int kBytes>
COMPACT_INLINE void take(const Work& w, std::int64_t begin, std::int64_t end) {
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t set = task / w.chunks, chunk = task % w.chunks;
    switch (w.sets.cu[set + 1] - w.sets.cu[set]) {
      case 1: take_chunk<kBytes, 1>(w, set, chunk); break;
      case 2: take_chunk<kBytes, 2>(w, set, chunk); break;
      case 3: take_chunk<kBytes, 3>(w, set, chunk); break;
      case 4: take_chunk<kBytes, 4>(w, set, chunk); break;
      default: take_chunk<kBytes, 0>(w, set, chunk);
    }
  }
}

using Take = void (*)(const Work&, std::int64_t, std::int64_t);

void take_plain(const Work& w, std::int64_t begin, std::int64_t end) {
  take<16>(w, begin, end);
}

#if COMPACT_X86
__attribute__((target("avx2"))) void take_avx2(const Work& w, std::int64_t begin,
                                               std::int64_t end) {
  take<32>(w, begin, end);
}

__attribute__((target("avx512f"))) void take_avx512(const Work& w, std::int64_t begin,
                                                    std::int64_t end) {
  take<64>(w, begin, end);
}
#endif

Take widest() {
#if COMPACT_X86
  if (simd_level() > 1) return take_avx512;
  if (simd_level() > 0) return take_avx2;
#endif
  return take_plain;
}

struct Shared {
  const Work& work;
  Take take;
};

void share(void* data, int part, int parts) {
  const Shared& s = *static_cast<Shared*>(data);
  const std::int64_t tasks = s.work.sets.count * s.work.chunks;
  s.take(s.work, tasks * part / parts, tasks * (part + 1) / parts);
}

void run(const Work& work, int threads) {
  Shared shared{work, widest()};
  const std::int64_t entries = work.sets.cu[work.sets.count] * work.sets.width;
  on_host_threads(entries < 1 << 15 ? 1 : threads, share, &shared);
}

Work plan(const RowSets& sets) {
  Work work{sets, {0}, (sets.width + kChunk - 1) / kChunk};
  for (std::int64_t s = 0; s < sets.count; ++s) {
    const std::int64_t size = sets.cu[s + 1] - sets.cu[s];
    work.cu_pairs.push_back(work.cu_pairs.back() + size * size);
  }
  return work;
}

}  // namespace

void add_divergences(const RowSets& sets, double* kl, int threads) {
  Work work = plan(sets);
  std::vector<double> parts(static_cast<std::size_t>(work.cu_pairs.back() * work.chunks));
  work.parts = parts.data();
  if (parts.empty()) return;
  run(work, threads);
  for (std::int64_t e = 0; e < work.cu_pairs.back(); ++e)
    for (std::int64_t k = 0; k < work.chunks; ++k) kl[e] += parts[e * work.chunks + k];
}

void divergence_gradients(const RowSets& sets, const float* constant, const float* c, int threads) {
  Work work = plan(sets);
  work.constant = constant;
  work.c = c;
  if (work.chunks > 0 && sets.count > 0) run(work, threads);
}

}  // namespace compact

#endif
