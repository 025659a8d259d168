// Dropout whose units are drawn where they are applied: what compact_fast/lean/dropout.py does with
// NumPy, in one pass.
#pragma once

#include <cstdint>

namespace compact {

constexpr std::int64_t kDropoutBlock = 1 << 15;  // entries whose units have generators of their own

// Unit i is kept where 16 random bits are below `most`. In each block of entries the bits are those
// of eight SFC64 generators in turns, 64 each, the lowest 16 first. SplitMix64 makes their states of
// the seed, 24 numbers a block: a of each, b of each, c of each; the counters begin at 1.
struct Units {
  std::uint64_t seed;
  std::uint32_t most;
};

// out[i] = x[i] where unit i is kept, else 0, for n entries of `size` bytes (2, 4 or 8); out may be x.
void drop(const void* x, int size, const Units& units, void* out, std::int64_t n, int threads);

// out[i] += x[i] where unit i is kept, for n floats.
void add_kept(const float* x, const Units& units, float* out, std::int64_t n, int threads);

}  // namespace compact
