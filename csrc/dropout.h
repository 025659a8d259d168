// Dropout with a bit an entry: what compact_fast/lean/dropout.py does with NumPy, in one pass each.
#pragma once

#include <cstdint>

namespace compact {

// bits [ceil(n / 8)], entry i in bit i % 8 of byte i / 8: 1 where 16 random bits are below `most`
// (1 .. 65535). The random bits are those of eight SFC64 generators in turns, 64 each, the lowest
// 16 first; SplitMix64 makes their states of the seed: a of each, b of each, c of each; the counters
// begin at 1. Bits behind the n-th are random too.
void draw_bits(std::uint64_t seed, std::uint32_t most, std::uint8_t* bits, std::int64_t n);

// out[i] = x[i] where bit i is set, else 0, for n entries of `size` bytes (2, 4 or 8); out may be x.
void apply_bits(const void* x, int size, const std::uint8_t* bits, void* out, std::int64_t n,
                int threads);

// out[i] += x[i] where bit i is set, for n floats.
void add_bits(const float* x, const std::uint8_t* bits, float* out, std::int64_t n, int threads);

}  // namespace compact
