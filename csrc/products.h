// Matrix products in float32, for the shapes of a loss: a few hundred rows by a block of a large
// vocabulary. There a maths library is a sixth slower than with square ones, and keeps 10 MB.
//
// Every entry of a product is one chain of fused multiply-adds in the order of k, parted every kSpan
// terms, so its bits depend neither on the other entries nor on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace compact {

// Entry (i, j) lies at data + i * row + j * column.
struct Factor {
  const float* data;
  std::ptrdiff_t row, column;
};

// Whether this machine has AVX-512. With AVX2 alone a maths library is the quicker one.
bool can_multiply();

// c [m, n], rows `stride` apart, becomes (or grows by, with `add`) a [m, k] times b [k, n]. One of
// the strides of a, and of b, is 1. On at most `threads` threads.
void multiply(const Factor& a, const Factor& b, float* c, std::ptrdiff_t stride, std::int64_t m,
              std::int64_t n, std::int64_t k, bool add, int threads);

}  // namespace compact
