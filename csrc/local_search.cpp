#include "local_search.h"

#include <algorithm>

namespace compact {

void LocalSearch::begin(const Problem& p, const std::int32_t* column_of) {
  const auto mark = [](const Neighbours& of, std::int64_t n, std::vector<std::uint8_t>& lists) {
    lists.assign(static_cast<std::size_t>(n * n), 0);
    for (std::int64_t v = 0; v < n; ++v)
      for (int list = 0; list < kLists; ++list)
        for (const std::int32_t* w = of.begin(v, list); w != of.end(v, list); ++w)
          lists[v * n + *w] |= static_cast<std::uint8_t>(1 << list);
  };
  mark(*p.a, p.n, lists_a_);
  mark(*p.b, p.m, lists_b_);
  for (int set = 0; set < 1 << kLists; ++set) {
    worth_of_lists_[set] = 0;
    for (int list = 0; list < kLists; ++list)
      if (set >> list & 1) worth_of_lists_[set] += 2 * p.half[list / 2];
  }
  stale_.assign(static_cast<std::size_t>(p.n), 0);
  queue_.clear();
  now_.start(p, column_of);
}

// What F counts for the edges between the pairs (i, j) and (k, l).
std::int64_t LocalSearch::between(const Problem& p, std::int64_t i, std::int64_t j, std::int64_t k,
                                  std::int64_t l) const {
  const int both = lists_a_[i * p.n + k] & lists_b_[j * p.m + l];
  return both ? worth_of_lists_[both] * p.similarity(i, j) * p.similarity(k, l) : 0;
}

std::int64_t LocalSearch::improve(const Problem& p, std::vector<std::int32_t>& column_of) {
  begin(p, column_of.data());
  price_.resize(static_cast<std::size_t>(p.n * p.m));
  next_.resize(static_cast<std::size_t>(p.n));
  for (int round = 0; round < 8; ++round) {
    for (std::int64_t i = 0; i < p.n; ++i)
      for (std::int64_t j = 0; j < p.m; ++j)
        price_[i * p.m + j] = static_cast<std::int32_t>(now_.worth(i, j) >> kShift);
    lap_.solve(price_.data(), p.n, p.m, next_.data());
    if (p.objective(next_.data()) <= now_.value()) break;
    now_.start(p, next_.data());
  }
  exchange(p);
  column_of = now_.columns();
  return now_.value();
}

// Row i and those whose worth depends on its column must be looked at again.
void LocalSearch::mark_stale(const Problem& p, std::int64_t i) {
  const auto mark = [&](std::int32_t row) {
    if (stale_[static_cast<std::size_t>(row)]) return;
    stale_[static_cast<std::size_t>(row)] = 1;
    queue_.push_back(row);
  };
  mark(static_cast<std::int32_t>(i));
  for (const std::int32_t *k = p.a->begin(i, 0), *end = p.a->end(i, kLists - 1); k != end; ++k)
    mark(*k);
}

void LocalSearch::add(const Problem& p, std::int64_t i, std::int64_t j) {
  if (i < 0 || j < 0 || p.similarity(i, j) == 0) return;
  now_.add(i, j);
  mark_stale(p, i);
}

void LocalSearch::remove(const Problem& p, std::int64_t i, std::int64_t j) {
  if (i < 0 || j < 0) return;
  now_.remove(i, j);
  mark_stale(p, i);
}

// Row i to `column`, whose row, if it has one, gets i's.
bool LocalSearch::try_exchange(const Problem& p, std::int64_t i, std::int32_t column) {
  const std::int32_t old = now_.column_of(i), other = now_.row_of(column);
  std::int64_t gain = now_.worth(i, column);
  if (old >= 0) gain -= now_.worth(i, old);
  if (other >= 0) {
    gain -= now_.worth(other, column);
    // worth() counts the edges between the two old pairs twice, and none between the new ones
    if (old >= 0)
      gain += now_.worth(other, old) + between(p, i, old, other, column) +
              between(p, i, column, other, old);
  }
  if (gain <= 0) return false;
  remove(p, i, old);
  remove(p, other, column);
  add(p, i, column);
  add(p, other, old);
  return true;
}

void LocalSearch::exchange(const Problem& p) {
  for (bool better = true; better;) {
    better = false;
    for (std::int64_t i = 0; i < p.n; ++i)
      for (std::int32_t j = 0; j < p.m; ++j)
        if (now_.column_of(i) != j && p.similarity(i, j) > 0 && try_exchange(p, i, j)) better = true;
  }
  for (std::int32_t row : queue_) stale_[static_cast<std::size_t>(row)] = 0;
  queue_.clear();
}

void LocalSearch::exchange_stale(const Problem& p) {
  for (std::size_t next = 0; next < queue_.size(); ++next) {
    const std::int32_t i = queue_[next];
    stale_[static_cast<std::size_t>(i)] = 0;
    for (std::int32_t j = 0; j < p.m; ++j)
      if (now_.column_of(i) != j && p.similarity(i, j) > 0) try_exchange(p, i, j);
  }
  queue_.clear();
}

std::int64_t LocalSearch::shake(const Problem& p, std::vector<std::int32_t>& column_of,
                                std::int64_t rounds) {
  std::uint64_t state = 0x9E3779B97F4A7C15ull;
  auto below = [&](std::int64_t limit) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(limit));
  };
  begin(p, column_of.data());
  std::int64_t best = now_.value(), current = best;
  if (p.n < 2 || p.m < 2) return best;
  kept_ = column_of;
  for (std::int64_t round = 0; round < rounds; ++round) {
    const std::int64_t moved = 3 + below(3);
    std::int64_t from = below(p.n);
    for (std::int64_t k = 0; k < moved; ++k) {
      const std::int64_t to = below(p.n);
      if (from == to) continue;
      const std::int32_t x = now_.column_of(from), y = now_.column_of(to);
      remove(p, from, x);
      remove(p, to, y);
      add(p, from, y);
      add(p, to, x);
      from = to;
    }
    if (p.m > p.n) {  // a row may also take a column that is free
      const std::int64_t column = below(p.m);
      if (now_.row_of(column) < 0 && p.similarity(from, column) > 0) {
        remove(p, from, now_.column_of(from));
        add(p, from, column);
      }
    }
    exchange_stale(p);
    if (now_.value() < current - (best >> 9)) {  // a little worse may lead to better
      now_.start(p, kept_.data());
      continue;
    }
    current = now_.value();
    kept_ = now_.columns();
    if (current > best) {
      best = current;
      column_of = kept_;
    }
  }
  return best;
}

}  // namespace compact
