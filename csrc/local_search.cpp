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
  restart(p, column_of);
}

void LocalSearch::restart(const Problem& p, const std::int32_t* column_of) {
  now_.start(p, column_of);
  here_.assign(static_cast<std::size_t>(p.m), 0);
  for (std::int64_t i = 0; i < p.n; ++i) price(i);
}

void LocalSearch::price(std::int64_t i) {
  const std::int32_t column = now_.column_of(i);
  if (column >= 0) here_[static_cast<std::size_t>(column)] = now_.worth(i, column);
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
    restart(p, next_.data());
  }
  exchange(p);
  column_of = now_.columns();
  return now_.value();
}

// Row i and those whose worth depends on its column must be looked at again.
void LocalSearch::mark_stale(const Problem& p, std::int64_t i) {
  const auto mark = [&](std::int32_t row) {
    price(row);
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
  here_[static_cast<std::size_t>(j)] = 0;
  mark_stale(p, i);
}

// Row i to `column`, whose row, if it has one, gets i's.
void LocalSearch::swap(const Problem& p, std::int32_t i, std::int32_t column) {
  const std::int32_t old = now_.column_of(i), other = now_.row_of(column);
  remove(p, i, old);
  remove(p, other, column);
  add(p, i, column);
  add(p, other, old);
}

// What swap() adds to the value.
std::int64_t LocalSearch::gain(const Problem& p, std::int32_t i, std::int32_t column) const {
  const std::int32_t old = now_.column_of(i), other = now_.row_of(column);
  std::int64_t gain = now_.worth(i, column) - here_[column];
  if (old < 0) return gain;
  gain -= here_[old];
  if (other < 0) return gain;
  // worth() counts the edges between the two old pairs twice, and none between the new ones
  return gain + now_.worth(other, old) + between(p, i, old, other, column) +
         between(p, i, column, other, old);
}

// Makes every exchange of row i that improves. most[j] is an upper bound on the worth of any pair of
// column j; without it the present worths are looked up.
bool LocalSearch::exchange_row(const Problem& p, std::int32_t i, const std::int64_t* most) {
  const std::int32_t* s = p.s + i * p.m;
  const std::int64_t* beside = now_.beside(i);
  bool better = false;
  // the least that column j must be worth to i, beyond what it is worth where it is, for a gain
  const auto least = [&](std::int32_t old) {
    if (old < 0) return std::int64_t{0};
    std::int64_t there = most ? most[old] : 0;
    if (!most)
      for (std::int64_t o = 0; o < p.n; ++o) there = std::max(there, now_.worth(o, old));
    return here_[old] - there;
  };
  std::int64_t floor = least(now_.column_of(i));
  const auto look = [&](std::int32_t j) {
    if (s[j] == 0 || j == now_.column_of(i) || gain(p, i, j) <= 0) return;
    swap(p, i, j);
    better = true;
    floor = least(j);
  };
  for (std::int32_t j = 0; j < p.m; ++j)
    if (s[j] * ((std::int64_t{1} << kShift) + beside[j]) - here_[j] > floor) look(j);
  // beside those, exchanges with a neighbour may gain or keep the edge between the two
  for (const std::int32_t *k = p.a->begin(i, 0), *end = p.a->end(i, kLists - 1); k != end; ++k)
    if (now_.column_of(*k) >= 0) look(now_.column_of(*k));
  return better;
}

void LocalSearch::exchange(const Problem& p) {
  for (bool better = true; better;) {
    better = false;
    for (std::int32_t i = 0; i < p.n; ++i) better = exchange_row(p, i, nullptr) || better;
  }
  for (std::int32_t row : queue_) stale_[static_cast<std::size_t>(row)] = 0;
  queue_.clear();
}

void LocalSearch::exchange_stale(const Problem& p, const std::vector<std::int64_t>& most) {
  for (std::size_t next = 0; next < queue_.size(); ++next) {
    stale_[static_cast<std::size_t>(queue_[next])] = 0;
    exchange_row(p, queue_[next], most.data());
  }
  queue_.clear();
}

std::int64_t LocalSearch::shake(const Problem& p, std::vector<std::int32_t>& column_of,
                                std::int64_t rounds, const std::vector<std::int64_t>& most) {
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
      const std::int32_t* near = p.a->begin(from, 0);
      const std::int64_t nears = p.a->end(from, kLists - 1) - near;
      const std::int64_t to = nears > 0 && below(2) == 1 ? near[below(nears)] : below(p.n);
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
    exchange_stale(p, most);
    if (now_.value() < current - (best >> 9)) {  // a little worse may lead to better
      restart(p, kept_.data());
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
