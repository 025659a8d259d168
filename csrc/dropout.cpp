#include "dropout.h"

#include "simd.h"

#if COMPACT_VECTORS

#include <algorithm>
#include <cstring>

#include "host_threads.h"

namespace compact {

namespace {

#define COMPACT_INLINE inline __attribute__((always_inline))

typedef std::uint64_t Words __attribute__((vector_size(64)));  // one of each generator
typedef std::uint16_t Draws __attribute__((vector_size(64)));
typedef std::uint32_t Lanes __attribute__((vector_size(64)));

struct Drawing {
  std::uint64_t seed;
  std::uint32_t most;
  std::uint8_t* bits;
  std::int64_t n;
};

COMPACT_INLINE std::uint32_t below(Words words, std::uint32_t most) {
  Draws draws;
  std::memcpy(&draws, &words, sizeof draws);
  std::uint32_t found = 0;
  for (int i = 0; i < 32; ++i) found |= static_cast<std::uint32_t>(draws[i] < most) << i;
  return found;
}

// SplitMix64.
COMPACT_INLINE std::uint64_t next_seed(std::uint64_t& seed) {
  std::uint64_t z = seed += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

COMPACT_INLINE void draw(const Drawing& d) {
  Words a, b, c, counter;
  std::uint64_t seed = d.seed;
  for (int i = 0; i < 8; ++i) a[i] = next_seed(seed);
  for (int i = 0; i < 8; ++i) b[i] = next_seed(seed);
  for (int i = 0; i < 8; ++i) c[i] = next_seed(seed);
  counter = Words{} + 1;
  const std::int64_t bytes = (d.n + 7) / 8;
  for (std::int64_t at = 0; at < bytes; at += 4) {
    const Words word = a + b + counter;
    counter += 1;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = ((c << 24) | (c >> 40)) + word;
    const std::uint32_t found = below(word, d.most);
    for (std::int64_t k = 0; k < std::min<std::int64_t>(4, bytes - at); ++k)
      d.bits[at + k] = static_cast<std::uint8_t>(found >> (8 * k));
  }
}

typedef float Floats __attribute__((vector_size(64)));

// All bits of a lane where its unit is kept. No comparison: see lanes.h.
COMPACT_INLINE Lanes kept_lanes(const std::uint8_t* bits, std::int64_t i) {
  const Lanes place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const std::uint32_t both = bits[i / 8] | static_cast<std::uint32_t>(bits[i / 8 + 1]) << 8;
  return Lanes{} - (((Lanes{} + both) >> place) & 1);
}

COMPACT_INLINE bool is_kept(const std::uint8_t* bits, std::int64_t i) {
  return bits[i / 8] >> (i % 8) & 1;
}

// Entries as whole numbers of their size: what is not kept is all zero bits. Begins at a multiple
// of 16.
template <class Entry>
COMPACT_INLINE void apply(const void* from, const std::uint8_t* bits, void* to, std::int64_t begin,
                          std::int64_t end) {
  const Entry* x = static_cast<const Entry*>(from);
  Entry* out = static_cast<Entry*>(to);
  std::int64_t i = begin;
  if (sizeof(Entry) == 4) {
    for (; i + 16 <= end; i += 16) {
      Lanes v;
      std::memcpy(&v, x + i, sizeof v);
      v &= kept_lanes(bits, i);
      std::memcpy(out + i, &v, sizeof v);
    }
  }
  for (; i < end; ++i) out[i] = is_kept(bits, i) ? x[i] : Entry{0};
}

COMPACT_INLINE void add(const float* x, const std::uint8_t* bits, float* out, std::int64_t begin,
                        std::int64_t end) {
  std::int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    Lanes v;
    Floats sum, more;
    std::memcpy(&v, x + i, sizeof v);
    v &= kept_lanes(bits, i);
    std::memcpy(&more, &v, sizeof v);
    std::memcpy(&sum, out + i, sizeof sum);
    sum += more;
    std::memcpy(out + i, &sum, sizeof sum);
  }
  for (; i < end; ++i)
    if (is_kept(bits, i)) out[i] += x[i];
}

constexpr int kAdd = 0;  // for a size: floats that are added

struct Applying {
  const void* x;
  int size;
  const std::uint8_t* bits;
  void* out;
  std::int64_t n;
};

COMPACT_INLINE void apply_any(const Applying& a, std::int64_t begin, std::int64_t end) {
  if (a.size == kAdd)
    add(static_cast<const float*>(a.x), a.bits, static_cast<float*>(a.out), begin, end);
  if (a.size == 2) apply<std::uint16_t>(a.x, a.bits, a.out, begin, end);
  if (a.size == 4) apply<std::uint32_t>(a.x, a.bits, a.out, begin, end);
  if (a.size == 8) apply<std::uint64_t>(a.x, a.bits, a.out, begin, end);
}

using Draw = void (*)(const Drawing&);
using Apply = void (*)(const Applying&, std::int64_t, std::int64_t);

struct Ways {
  Draw draw;
  Apply apply;
};

void draw_plain(const Drawing& d) { draw(d); }
void apply_plain(const Applying& a, std::int64_t i, std::int64_t j) { apply_any(a, i, j); }

#if COMPACT_X86
#define COMPACT_WITH(name, instructions)                                                    \
  __attribute__((target(instructions))) void draw_##name(const Drawing& d) { draw(d); }     \
  __attribute__((target(instructions))) void apply_##name(const Applying& a, std::int64_t i, \
                                                          std::int64_t j) {                 \
    apply_any(a, i, j);                                                                     \
  }
COMPACT_WITH(avx2, "avx2")
COMPACT_WITH(avx512, "avx512f,avx512bw,avx512vl,avx512dq")
#endif

Ways widest() {
#if COMPACT_X86
  if (simd_level() > 1) return {draw_avx512, apply_avx512};
  if (simd_level() > 0) return {draw_avx2, apply_avx2};
#endif
  return {draw_plain, apply_plain};
}

struct Shared {
  const Applying& work;
  Apply apply;
};

void share(void* data, int part, int parts) {
  const Shared& s = *static_cast<Shared*>(data);
  const std::int64_t pieces = (s.work.n + 15) / 16;
  s.apply(s.work, 16 * (pieces * part / parts),
          std::min(s.work.n, 16 * (pieces * (part + 1) / parts)));
}

}  // namespace

void draw_bits(std::uint64_t seed, std::uint32_t most, std::uint8_t* bits, std::int64_t n) {
  widest().draw({seed, most, bits, n});
}

void apply_bits(const void* x, int size, const std::uint8_t* bits, void* out, std::int64_t n,
                int threads) {
  const Applying work{x, size, bits, out, n};
  Shared shared{work, widest().apply};
  if (n < 1 << 15) threads = 1;  // too little to share
  on_host_threads(threads, share, &shared);
}

void add_bits(const float* x, const std::uint8_t* bits, float* out, std::int64_t n, int threads) {
  apply_bits(x, kAdd, bits, out, n, threads);
}

}  // namespace compact

#endif
