#include "matching.h"

#include <algorithm>

namespace compact {

std::int64_t self_value(Mode mode, const std::int32_t* self, std::int64_t n, const EdgeList& edges,
                        const std::int32_t* edge_half) {
  thread_local std::vector<std::int64_t> beside;
  beside.assign(static_cast<std::size_t>(n), 0);
  for (std::int64_t e = 0; e < edges.size; ++e) {
    const std::int64_t half = edge_half[edges.type[e]];
    beside[edges.source[e]] += half * self[edges.target[e]];
    beside[edges.target[e]] += half * self[edges.source[e]];
  }
  std::int64_t total = 0;
  const std::int64_t round = mode == Mode::kRelaxed ? (std::int64_t{1} << kShift) - 1 : 0;
  for (std::int64_t i = 0; i < n; ++i) {
    total += std::int64_t{self[i]} << kShift;
    const std::int64_t pairs = self[i] * beside[i];
    total += round ? (pairs + round) & ~round : pairs;
  }
  return total >> kShift;
}

MatchOutcome Matcher::match(Mode mode, const std::int32_t* similarity, std::int64_t n, std::int64_t m,
                            const EdgeList& a, const EdgeList& b, const std::int32_t* edge_half,
                            std::int64_t node_budget, std::int32_t* assigned) {
  a_.build(a, n);
  b_.build(b, m);
  const Problem p{similarity, n, m, {edge_half[0], edge_half[1]}, &a_, &b_};
  c_.resize(static_cast<std::size_t>(n * m));
  columns_.assign(static_cast<std::size_t>(n), -1);
  bounds_.compute(similarity, n, m, a_, b_, p.half, nullptr, p.narrow(), 0, c_.data());
  const std::int64_t ceiling = lap_.solve(c_.data(), n, m, columns_.data());
  MatchOutcome out{ceiling, ceiling, true};
  if (mode != Mode::kRelaxed) {
    std::int64_t value = local_.improve(p, columns_);
    if (n == m && (value >> kShift) < ceiling) {  // equal graphs must score exactly 1
      straight_.resize(static_cast<std::size_t>(n));
      for (std::int64_t i = 0; i < n; ++i) straight_[i] = static_cast<std::int32_t>(i);
      if (const std::int64_t straight = p.objective(straight_.data()); straight > value) {
        value = straight;
        columns_ = straight_;
      }
    }
    out.value = value >> kShift;
    out.proven = out.value == ceiling;
    if (mode == Mode::kExact && !out.proven) {
      out.bound = std::min(ceiling, proof_.run(p, node_budget, value, columns_));
      out.value = value >> kShift;
      out.proven = out.bound == out.value;
    }
  }
  if (assigned) std::copy(columns_.begin(), columns_.end(), assigned);
  return out;
}

}  // namespace compact
