#include "layers.h"

#include "simd.h"

#if COMPACT_VECTORS

#include <algorithm>
#include <cmath>

#include "host_threads.h"
#include "lanes.h"

namespace compact {

namespace {

struct Work {
  const float *x, *y, *grad;  // gate and up; or rows and weight
  const float* given;         // what a norm divides by, inverted
  float *out, *more;
  std::int64_t n, m;  // rows of m; of entries: n rows of one
  float eps;
  std::int64_t heads = 1;  // a row has
  const float* added = nullptr;
};

constexpr std::int64_t kSums = 4;  // that a row's sum is made of

// `left` entries or a whole vector; of the last ones the others are 0.
template <class V = Lanes>
COMPACT_INLINE V take(const float* p, std::int64_t left) {
  V v = {};
  if (left >= static_cast<std::int64_t>(sizeof v / sizeof(float)))
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, static_cast<std::size_t>(left) * sizeof(float));
  return v;
}

template <class V>
COMPACT_INLINE void put(float* p, V v, std::int64_t left) {
  if (left >= static_cast<std::int64_t>(sizeof v / sizeof(float)))
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, static_cast<std::size_t>(left) * sizeof(float));
}

// ---- SwiGLU ------------------------------------------------------------------------------------

// What goes entry by entry takes vectors as wide as the machine's.

// 1 / (1 + exp(-x)), 0 below -87 and 1 above 87.
template <class P>
COMPACT_INLINE typename P::Vector sigmoid(typename P::Vector x) {
  typedef typename P::Vector V;
  const V none = {}, most = none - kLowest;
  V t = x < -most ? most : -x;
  t = most < x ? -most : t;
  const V found = 1.0f / (1.0f + exp_of_any<V, typename P::Ints>(t));
  return x < -most ? none : found;
}

template <int kBytes>
COMPACT_INLINE void gated_part(const Work& w, std::int64_t begin, std::int64_t end) {
  typedef Part<kBytes> P;
  typedef typename P::Vector V;
  for (std::int64_t i = begin; i < end; i += P::kCount) {
    const V gate = take<V>(w.x + i, end - i);
    put(w.out + i, gate * sigmoid<P>(gate) * take<V>(w.y + i, end - i), end - i);
  }
}

template <int kBytes>
COMPACT_INLINE void gated_back_part(const Work& w, std::int64_t begin, std::int64_t end) {
  typedef Part<kBytes> P;
  typedef typename P::Vector V;
  for (std::int64_t i = begin; i < end; i += P::kCount) {
    const std::int64_t left = end - i;
    const V gate = take<V>(w.x + i, left), grad = take<V>(w.grad + i, left), s = sigmoid<P>(gate);
    const V g_gate = grad * take<V>(w.y + i, left) * (s * (1.0f + gate * (1.0f - s)));
    put(w.out + i, g_gate, left);
    put(w.more + i, grad * (gate * s), left);
  }
}

// ---- RMS norms ---------------------------------------------------------------------------------

// The sum of a row's products, of two rows.
COMPACT_INLINE float dot(const float* a, const float* b, std::int64_t m) {
  Lanes sums[kSums] = {};
  std::int64_t j = 0;
  for (; j + kSums * kLanes <= m; j += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) sums[k] += load(a + j + k * kLanes) * load(b + j + k * kLanes);
  for (; j < m; j += kLanes) sums[0] += take(a + j, m - j) * take(b + j, m - j);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class P>
COMPACT_INLINE void norm_row(const float* x, const float* weight, float by, float* out,
                             std::int64_t m) {
  typedef typename P::Vector V;
  for (std::int64_t j = 0; j < m; j += P::kCount)
    put(out + j, take<V>(x + j, m - j) * by * take<V>(weight + j, m - j), m - j);
}

template <int kBytes>
COMPACT_INLINE void norm_part(const Work& w, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float* x = w.x + i * w.m;
    const float mean = dot(x, x, w.m) / static_cast<float>(w.m);
    const float by = w.more[i] = 1.0f / std::sqrt(mean + w.eps);
    norm_row<Part<kBytes>>(x, w.y, by, w.out + i * w.m, w.m);
  }
}

template <int kBytes>
COMPACT_INLINE void norm_again_part(const Work& w, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i)
    norm_row<Part<kBytes>>(w.x + i * w.m, w.y, w.given[i], w.out + i * w.m, w.m);
}

template <int kBytes>
COMPACT_INLINE void norm_back_part(const Work& w, std::int64_t begin, std::int64_t end) {
  typedef Part<kBytes> P;
  typedef typename P::Vector V;
  const std::int64_t m = w.m;
  for (std::int64_t i = begin; i < end; ++i) {
    const float *x = w.x + i * m, *grad = w.grad + i * m;
    float* out = w.out + i * m;
    for (std::int64_t j = 0; j < m; j += P::kCount)
      put(out + j, take<V>(grad + j, m - j) * take<V>(w.y + j, m - j), m - j);
    const float by = w.given[i];
    const float along = dot(out, x, m) * (by * by * by) / static_cast<float>(m);
    for (std::int64_t j = 0; j < m; j += P::kCount) {
      V g_x = take<V>(out + j, m - j) * by - take<V>(x + j, m - j) * along;
      if (w.added != nullptr) g_x += take<V>(w.added + i * m + j, m - j);
      put(out + j, g_x, m - j);
    }
  }
}

// ---- rotary positions: rows are tokens, of heads of m ------------------------------------------

template <class P, bool kBack>
COMPACT_INLINE void rotate_part(const Work& w, std::int64_t begin, std::int64_t end) {
  typedef typename P::Vector V;
  const std::int64_t half = w.m / 2;
  for (std::int64_t i = begin; i < end; ++i) {
    const float *cos = w.y + i * w.m, *sin = w.given + i * w.m;
    for (std::int64_t h = 0; h < w.heads; ++h) {
      const float* x = w.x + (i * w.heads + h) * w.m;
      float* out = w.out + (i * w.heads + h) * w.m;
      for (std::int64_t j = 0; j < half; j += P::kCount) {
        const std::int64_t k = j + half, count = half - j;
        const V first = take<V>(x + j, count), second = take<V>(x + k, count);
        const V c = take<V>(cos + j, count), c2 = take<V>(cos + k, count);
        const V s = take<V>(sin + j, count), s2 = take<V>(sin + k, count);
        put(out + j, kBack ? first * c + second * s2 : first * c - second * s, count);
        put(out + k, kBack ? second * c2 - first * s : second * c2 + first * s2, count);
      }
    }
  }
}

template <int kBytes>
COMPACT_INLINE void forth_part(const Work& w, std::int64_t begin, std::int64_t end) {
  rotate_part<Part<kBytes>, false>(w, begin, end);
}

template <int kBytes>
COMPACT_INLINE void back_part(const Work& w, std::int64_t begin, std::int64_t end) {
  rotate_part<Part<kBytes>, true>(w, begin, end);
}

// ---- by instructions, and threads --------------------------------------------------------------

using Rows = void (*)(const Work&, std::int64_t, std::int64_t);

struct Ways {
  Rows gated, gated_back, norm, norm_again, norm_back, forth, back;
};

#define COMPACT_PART(part, name, instructions, bytes)                            \
  instructions void part##_##name(const Work& w, std::int64_t i, std::int64_t j) { \
    part##_part<bytes>(w, i, j);                                                 \
  }
#define COMPACT_WITH(name, instructions, bytes)      \
  COMPACT_PART(gated, name, instructions, bytes)      \
  COMPACT_PART(gated_back, name, instructions, bytes) \
  COMPACT_PART(norm, name, instructions, bytes)       \
  COMPACT_PART(norm_again, name, instructions, bytes) \
  COMPACT_PART(norm_back, name, instructions, bytes)  \
  COMPACT_PART(forth, name, instructions, bytes)      \
  COMPACT_PART(back, name, instructions, bytes)       \
  constexpr Ways name##_ways{gated_##name, gated_back_##name, norm_##name, norm_again_##name, \
                             norm_back_##name, forth_##name, back_##name};
COMPACT_WITH(plain, , 16)
#if COMPACT_X86
COMPACT_WITH(avx2, __attribute__((target("avx2"))), 32)
COMPACT_WITH(avx512, __attribute__((target("avx512f"))), 64)
#endif

const Ways& widest() {
#if COMPACT_X86
  if (simd_level() > 1) return avx512_ways;
  if (simd_level() > 0) return avx2_ways;
#endif
  return plain_ways;
}

struct Shared {
  const Work& work;
  Rows rows;
  std::int64_t size;  // rows that stay together
};

void share(void* data, int part, int parts) {
  const Shared& s = *static_cast<Shared*>(data);
  const std::int64_t pieces = (s.work.n + s.size - 1) / s.size;
  const std::int64_t begin = pieces * part / parts * s.size;
  s.rows(s.work, begin, std::min(s.work.n, pieces * (part + 1) / parts * s.size));
}

void run(const Work& work, Rows rows, int threads) {
  Shared shared{work, rows, work.m == 1 ? kLanes : 1};
  if (work.n * work.m * work.heads < 1 << 15) threads = 1;  // too little to share
  on_host_threads(threads, share, &shared);
}

}  // namespace

void gated(const float* gate, const float* up, float* out, std::int64_t n, int threads) {
  run({gate, up, nullptr, nullptr, out, nullptr, n, 1, 0.0f}, widest().gated, threads);
}

void gated_back(const float* grad, const float* gate, const float* up, float* g_gate, float* g_up,
                std::int64_t n, int threads) {
  run({gate, up, grad, nullptr, g_gate, g_up, n, 1, 0.0f}, widest().gated_back, threads);
}

void norm(const float* x, const float* weight, float eps, float* inverse, float* out, std::int64_t n,
          std::int64_t m, int threads) {
  run({x, weight, nullptr, nullptr, out, inverse, n, m, eps}, widest().norm, threads);
}

void norm_again(const float* x, const float* weight, const float* inverse, float* out,
                std::int64_t n, std::int64_t m, int threads) {
  run({x, weight, nullptr, inverse, out, nullptr, n, m, 0.0f}, widest().norm_again, threads);
}

void norm_back(const float* grad, const float* x, const float* weight, const float* inverse,
               const float* more, float* g_x, std::int64_t n, std::int64_t m, int threads) {
  run({x, weight, grad, inverse, g_x, nullptr, n, m, 0.0f, 1, more}, widest().norm_back, threads);
}

void rotate(const float* x, const float* cos, const float* sin, float* out, std::int64_t n,
            std::int64_t heads, std::int64_t d, bool back, int threads) {
  const Ways& ways = widest();
  run({x, cos, nullptr, sin, out, nullptr, n, d, 0.0f, heads}, back ? ways.back : ways.forth, threads);
}

}  // namespace compact

#endif
