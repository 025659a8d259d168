#include "matching.h"

#include <algorithm>

namespace compact {

namespace {

// < 0, 0 or > 0 as the edges of `a` come before, are, or come after those of `b`.
int order(const EdgeList& a, const EdgeList& b) {
  if (a.size != b.size) return a.size < b.size ? -1 : 1;
  for (std::int64_t e = 0; e < a.size; ++e) {
    if (a.source[e] != b.source[e]) return a.source[e] < b.source[e] ? -1 : 1;
    if (a.target[e] != b.target[e]) return a.target[e] < b.target[e] ? -1 : 1;
    if (a.type[e] != b.type[e]) return a.type[e] < b.type[e] ? -1 : 1;
  }
  return 0;
}

// A search depends on which graph gives the rows. Should it be the second? The smaller one does; of
// equal ones that with the first edges, then that by which the similarities come first. So a pair
// has one value, whichever way round it is given.
bool rows_from_second(const std::int32_t* s, std::int64_t n, std::int64_t m, const EdgeList& a,
                      const EdgeList& b) {
  if (n != m) return n > m;
  if (const int which = order(a, b)) return which > 0;
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = i + 1; j < n; ++j)
      if (s[i * n + j] != s[j * n + i]) return s[i * n + j] > s[j * n + i];
  return false;
}

}  // namespace

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
  if (mode != Mode::kRelaxed && rows_from_second(similarity, n, m, a, b)) {
    turned_.resize(static_cast<std::size_t>(n * m));
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < m; ++j) turned_[j * n + i] = similarity[i * m + j];
    const MatchOutcome out =
        match_rows(mode, turned_.data(), m, n, b, a, edge_half, node_budget);
    if (assigned) {
      std::fill(assigned, assigned + n, -1);
      for (std::int64_t j = 0; j < m; ++j)
        if (columns_[j] >= 0) assigned[columns_[j]] = static_cast<std::int32_t>(j);
    }
    return out;
  }
  const MatchOutcome out = match_rows(mode, similarity, n, m, a, b, edge_half, node_budget);
  if (assigned) std::copy(columns_.begin(), columns_.end(), assigned);
  return out;
}

MatchOutcome Matcher::match_rows(Mode mode, const std::int32_t* similarity, std::int64_t n,
                                 std::int64_t m, const EdgeList& a, const EdgeList& b,
                                 const std::int32_t* edge_half, std::int64_t node_budget) {
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
  return out;
}

}  // namespace compact
