// Divergences between rows of logits that are compared with one another, and their gradient:
// sums over pairs of c_ij (KL(p_i || p_j) + KL(p_j || p_i)), a block of the vocabulary at a time.
// What compact_fast/backends/pairs.py does in a dozen passes over the block, in one each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace compact {

constexpr std::int64_t kMostCompared = 16;  // rows in a set

// Sets of rows of z [n, width]: set s has rows members[cu[s]] .. members[cu[s + 1] - 1], at most
// kMostCompared. `logsumexp` is by row of z. Matrices [K, K] of the sets lie one behind another.
struct RowSets {
  float* z;
  std::ptrdiff_t stride;
  std::int64_t width;
  std::int64_t count;
  const std::int64_t* cu;
  const std::int64_t* members;
  const double* logsumexp;
};

// Adds this block's part of KL(p_i || p_j) to kl [sum of K^2]. The same bits for every thread count
// and instruction set.
void add_divergences(const RowSets& sets, double* kl, int threads);

// Turns the logits z_i into p_i (constant_i + sum_j c_ij (a_i - a_j)) + sum_j c_ij (p_i - p_j) where
// a = log p; constant is by member, c [sum of K^2].
void divergence_gradients(const RowSets& sets, const float* constant, const float* c, int threads);

}  // namespace compact
