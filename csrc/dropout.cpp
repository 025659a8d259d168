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
typedef float Floats __attribute__((vector_size(64)));

COMPACT_INLINE std::uint32_t below(Words words, std::uint32_t most) {
  Draws draws;
  std::memcpy(&draws, &words, sizeof draws);
  std::uint32_t found = 0;
  for (int i = 0; i < 32; ++i) found |= static_cast<std::uint32_t>(draws[i] < most) << i;
  return found;
}

constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;  // of SplitMix64

// The units of a block, 32 at a time.
struct Generators {
  Words a, b, c, counter;
  std::uint32_t most;

  COMPACT_INLINE void begin(const Units& units, std::int64_t block) {
    std::uint64_t seed = units.seed + static_cast<std::uint64_t>(block) * 24 * kStep;
    for (Words* words : {&a, &b, &c})
      for (int i = 0; i < 8; ++i) (*words)[i] = split_mix(seed += kStep);
    counter = Words{} + 1;
    most = units.most;
  }

  COMPACT_INLINE std::uint32_t next() {
    const Words word = a + b + counter;
    counter += 1;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = ((c << 24) | (c >> 40)) + word;
    return below(word, most);
  }

  static COMPACT_INLINE std::uint64_t split_mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

// All bits of a lane where its unit is kept. No comparison: see lanes.h.
COMPACT_INLINE Lanes kept_lanes(std::uint32_t units) {
  const Lanes place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Lanes{} - (((Lanes{} + units) >> place) & 1);
}

// Entries as whole numbers of their size: what is not kept is all zero bits.
template <class Entry>
struct Drop {
  static COMPACT_INLINE void lanes(const Entry* x, std::uint32_t units, Entry* out) {
    Lanes v;
    std::memcpy(&v, x, sizeof v);
    v &= kept_lanes(units);
    std::memcpy(out, &v, sizeof v);
  }
  static COMPACT_INLINE void one(Entry x, bool kept, Entry& out) { out = kept ? x : Entry{0}; }
};

struct Add {
  static COMPACT_INLINE void lanes(const float* x, std::uint32_t units, float* out) {
    Lanes v;
    Floats sum, more;
    std::memcpy(&v, x, sizeof v);
    v &= kept_lanes(units);
    std::memcpy(&more, &v, sizeof v);
    std::memcpy(&sum, out, sizeof sum);
    sum += more;
    std::memcpy(out, &sum, sizeof sum);
  }
  static COMPACT_INLINE void one(float x, bool kept, float& out) {
    if (kept) out += x;
  }
};

template <class Way, class Entry>
COMPACT_INLINE void block(const Units& units, std::int64_t number, const void* from, void* to,
                          std::int64_t n) {
  const std::int64_t begin = number * kDropoutBlock, end = std::min(n, begin + kDropoutBlock);
  const Entry* x = static_cast<const Entry*>(from);
  Entry* out = static_cast<Entry*>(to);
  Generators generators;
  generators.begin(units, number);
  for (std::int64_t i = begin; i < end; i += 32) {
    const std::uint32_t kept = generators.next();
    if (sizeof(Entry) == 4 && i + 32 <= end) {
      Way::lanes(x + i, kept, out + i);
      Way::lanes(x + i + 16, kept >> 16, out + i + 16);
      continue;
    }
    for (std::int64_t k = 0; k < std::min<std::int64_t>(32, end - i); ++k)
      Way::one(x[i + k], kept >> k & 1, out[i + k]);
  }
}

constexpr int kAdd = 0;  // for a size: floats that are added

struct Work {
  const void* x;
  int size;
  const Units& units;
  void* out;
  std::int64_t n;
};

COMPACT_INLINE void any_block(const Work& w, std::int64_t i) {
  if (w.size == kAdd) block<Add, float>(w.units, i, w.x, w.out, w.n);
  if (w.size == 2) block<Drop<std::uint16_t>, std::uint16_t>(w.units, i, w.x, w.out, w.n);
  if (w.size == 4) block<Drop<std::uint32_t>, std::uint32_t>(w.units, i, w.x, w.out, w.n);
  if (w.size == 8) block<Drop<std::uint64_t>, std::uint64_t>(w.units, i, w.x, w.out, w.n);
}

using Block = void (*)(const Work&, std::int64_t);

void block_plain(const Work& w, std::int64_t i) { any_block(w, i); }

#if COMPACT_X86
__attribute__((target("avx2"))) void block_avx2(const Work& w, std::int64_t i) { any_block(w, i); }
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void block_avx512(const Work& w,
                                                                                std::int64_t i) {
  any_block(w, i);
}
#endif

Block widest() {
#if COMPACT_X86
  if (simd_level() > 1) return block_avx512;
  if (simd_level() > 0) return block_avx2;
#endif
  return block_plain;
}

struct Shared {
  const Work& work;
  Block block;
};

void share(void* data, int part, int parts) {
  const Shared& s = *static_cast<Shared*>(data);
  const std::int64_t blocks = (s.work.n + kDropoutBlock - 1) / kDropoutBlock;
  for (std::int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i)
    s.block(s.work, i);
}

void run(const Work& work, int threads) {
  Shared shared{work, widest()};
  if (work.n <= kDropoutBlock) threads = 1;
  on_host_threads(threads, share, &shared);
}

}  // namespace

void drop(const void* x, int size, const Units& units, void* out, std::int64_t n, int threads) {
  run({x, size, units, out, n}, threads);
}

void add_kept(const float* x, const Units& units, float* out, std::int64_t n, int threads) {
  run({x, kAdd, units, out, n}, threads);
}

}  // namespace compact

#endif
