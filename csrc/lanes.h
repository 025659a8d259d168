// Sixteen floats at a time, on any machine: sums are taken in one order on all of them, so results are
// the same bits whatever instructions there are. For files
// that are compiled without contraction, where COMPACT_VECTORS (simd.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace compact {

#define COMPACT_INLINE inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(64)));
typedef std::int32_t Bits __attribute__((vector_size(64)));
constexpr std::int64_t kLanes = 16;

COMPACT_INLINE Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

COMPACT_INLINE void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// Compilers compare vectors wider than the machine's entry by entry: here kBytes at a time, what an
// instruction takes.
template <int kBytes>
struct Part {
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef std::int32_t Ints __attribute__((vector_size(kBytes)));
  static constexpr std::int64_t kCount = kBytes / 4;
  static COMPACT_INLINE Vector of(const Lanes& v, int i) {
    Vector part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + i * kBytes, kBytes);
    return part;
  }
};

// a where x is below the bound, else b; NaN is not below it.
template <int kBytes>
COMPACT_INLINE Lanes where_below(Lanes x, Lanes bound, Lanes a, Lanes b) {
  typedef Part<kBytes> P;
  Lanes out;
  for (int i = 0; i < static_cast<int>(sizeof(Lanes)) / kBytes; ++i) {
    const typename P::Vector part = P::of(x, i) < P::of(bound, i) ? P::of(a, i) : P::of(b, i);
    std::memcpy(reinterpret_cast<char*>(&out) + i * kBytes, &part, kBytes);
  }
  return out;
}

template <int kBytes>
COMPACT_INLINE Lanes larger(Lanes a, Lanes b) {
  return where_below<kBytes>(b, a, a, b);
}

constexpr float kLowest = -87.0f;  // below, exp is not a normal number: 0

// exp of -87 <= x <= 87, to 1 ulp: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] (the
// one of the Cephes library's expf). NaN stays NaN. V: a vector of floats, I one of as many int32.
template <class V, class I>
COMPACT_INLINE V exp_of_any(V x) {
  const V shifted = x * 1.44269504088896341f + 12582912.0f;  // n in the lowest bits
  const V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

COMPACT_INLINE Lanes exp_of(Lanes x) { return exp_of_any<Lanes, Bits>(x); }

COMPACT_INLINE float sum(Lanes v) {
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2)
    for (std::int64_t k = 0; k < half; ++k) v[k] += v[k + half];
  return v[0];
}

}  // namespace compact
