// Dropout with a bit an entry: what compact_fast/lean/dropout.py does with NumPy, in one pass each.
#pragma once

#include <cstdint>

namespace compact {

// bits [ceil(n / 8)], entry i in bit i % 8 of byte i / 8: 1 where 16 random bits are below `most`
// (1 .. 65535). The random bits are those of eight SFC64 generators in turns, 64 each, the lowest
// 16 first; state [4, 8] holds a, b, c and the counter of each. Bits behind the n-th are random too.
void draw_bits(const std::uint64_t* state, std::uint32_t most, std::uint8_t* bits, std::int64_t n);

// out[i] = x[i] where bit i is set, else 0, for n entries of `size` bytes (2, 4 or 8); out may be x.
void apply_bits(const void* x, int size, const std::uint8_t* bits, void* out, std::int64_t n,
                int threads);

}  // namespace compact
