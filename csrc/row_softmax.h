// Softmax statistics of rows of logits whose vocabulary comes block by block: what
// compact_fast/backends/online.py does in eight passes, in two, without memory beside the block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace compact {

// Running statistics of n rows; see OnlineRows for their meaning.
struct RunningRows {
  const std::int64_t* target;  // [n]; outside of the vocabulary where a row has none
  float* peak;                 // [n]
  float* rest;                 // [n]
  float* at_target;            // [n]
  float* weighted;             // [n] sum of exp(z - peak) (z - peak), or null
  std::uint8_t* preceded;      // [n] an entry before the target is as large; null with `weighted`
  std::int64_t raw_begin = 0, raw_end = 0;  // rows that keep their logits
};

// Turns the logits z [n, width] of entries first .. first + width into exp(z - peak), the target's
// into 0, except those of raw rows. shrink [n]: exp(old peak - new peak). The same bits for every thread count and instruction
// set.
void update_rows(float* z, std::ptrdiff_t stride, std::int64_t n, std::int64_t width,
                 std::int64_t first, const RunningRows& rows, float* shrink, int threads);

}  // namespace compact
