#include "matching.h"

#include <algorithm>

namespace compact {

namespace {

constexpr int kShift = 23;  // S * S * half is in units of 1 / (kOne << kShift)
constexpr int kLists = 2 * kEdgeTypes;
constexpr std::int64_t kFirstSearch = 300;
constexpr std::int64_t kShakes = 4;  // rounds of iterated local search a row

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

void Matcher::Neighbours::build(const EdgeList& edges, std::int64_t n) {
  start.assign(static_cast<std::size_t>(n * kLists + 1), 0);
  node.resize(static_cast<std::size_t>(2 * edges.size));
  auto list = [](std::int32_t v, int type, int direction) {
    return static_cast<std::size_t>(v) * kLists + static_cast<std::size_t>(type * 2 + direction);
  };
  for (std::int64_t e = 0; e < edges.size; ++e) {
    ++start[list(edges.source[e], edges.type[e], 0) + 1];
    ++start[list(edges.target[e], edges.type[e], 1) + 1];
  }
  for (std::size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
  cursor.assign(start.begin(), start.end() - 1);
  for (std::int64_t e = 0; e < edges.size; ++e) {
    node[static_cast<std::size_t>(cursor[list(edges.source[e], edges.type[e], 0)]++)] = edges.target[e];
    node[static_cast<std::size_t>(cursor[list(edges.target[e], edges.type[e], 1)]++)] = edges.source[e];
  }
}

// Upper bounds on what each pair can contribute, with the neighbours that are already matched counted
// in full and the others by their best partner, half for each end. Units of 1 / (kOne << fine),
// rounded up. Rows that are fixed and columns that are taken get nothing.
void Matcher::bounds(const Problem& p, const std::int32_t* column_of, const std::uint8_t* taken,
                     int fine) {
  c_.resize(static_cast<std::size_t>(p.n * p.m));
  for (std::int64_t i = 0; i < p.n; ++i) {
    std::int32_t* row = c_.data() + i * p.m;
    if (column_of && column_of[i] != kOpen) {
      std::fill(row, row + p.m, 0);
      continue;
    }
    for (std::int64_t j = 0; j < p.m; ++j) {
      const std::int64_t s = p.s[i * p.m + j];
      if (s == 0 || (taken && taken[j])) {
        row[j] = 0;
        continue;
      }
      std::int64_t sum = 0;
      for (int list = 0; list < kLists; ++list) {
        const std::int32_t *a = na_.begin(i, list), *a_end = na_.end(i, list);
        const std::int32_t *b = nb_.begin(j, list), *b_end = nb_.end(j, list);
        if (a == a_end || b == b_end) continue;
        const std::int64_t half = p.half[list / 2];
        if (column_of == nullptr && a_end - a == 1 && b_end - b == 1) {
          sum += half * p.s[*a * p.m + *b];
          continue;
        }
        std::int64_t left = 0, right = 0, settled = 0;
        for (const std::int32_t* k = a; k != a_end; ++k) {
          const std::int32_t* srow = p.s + *k * p.m;
          if (column_of && column_of[*k] != kOpen) {
            const std::int32_t l = column_of[*k];
            if (l >= 0 && std::find(b, b_end, l) != b_end) settled += srow[l];
            continue;
          }
          std::int32_t best = 0;
          for (const std::int32_t* l = b; l != b_end; ++l)
            if (!taken || !taken[*l]) best = std::max(best, srow[*l]);
          left += best;
        }
        for (const std::int32_t* l = b; l != b_end; ++l) {
          if (taken && taken[*l]) continue;
          std::int32_t best = 0;
          for (const std::int32_t* k = a; k != a_end; ++k)
            if (!column_of || column_of[*k] == kOpen) best = std::max(best, p.s[*k * p.m + *l]);
          right += best;
        }
        sum += half * (std::min(left, right) + 2 * settled);
      }
      const int shift = kShift - fine;
      const std::int64_t extra = (s * sum + (std::int64_t{1} << shift) - 1) >> shift;
      row[j] = static_cast<std::int32_t>((s << fine) + extra);
    }
  }
}

std::int64_t Matcher::objective(const Problem& p, const std::int32_t* column_of) const {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < p.n; ++i) {
    const std::int32_t j = column_of[i];
    if (j < 0) continue;
    const std::int64_t s = p.s[i * p.m + j];
    total += s << kShift;
    for (int type = 0; type < kEdgeTypes; ++type) {
      const std::int32_t *b = nb_.begin(j, 2 * type), *b_end = nb_.end(j, 2 * type);
      for (const std::int32_t* k = na_.begin(i, 2 * type); k != na_.end(i, 2 * type); ++k) {
        const std::int32_t l = column_of[*k];
        if (l >= 0 && std::find(b, b_end, l) != b_end)
          total += 2 * p.half[type] * s * p.s[*k * p.m + l];
      }
    }
  }
  return total;
}

// What the pair (i, j) is worth beside the other matched pairs, in units of objective().
std::int64_t Matcher::contribution(const Problem& p, const std::int32_t* column_of, std::int64_t i,
                                   std::int64_t j) const {
  const std::int64_t s = p.s[i * p.m + j];
  if (s == 0) return 0;
  std::int64_t sum = 0;
  for (int list = 0; list < kLists; ++list) {
    const std::int32_t *b = nb_.begin(j, list), *b_end = nb_.end(j, list);
    if (b == b_end) continue;
    for (const std::int32_t* k = na_.begin(i, list); k != na_.end(i, list); ++k) {
      const std::int32_t l = column_of[*k];
      if (l >= 0 && std::find(b, b_end, l) != b_end) sum += p.half[list / 2] * p.s[*k * p.m + l];
    }
  }
  return (s << kShift) + 2 * s * sum;
}

// Reassigns all rows at once, each pair priced by its worth beside the present matching, then
// exchanges single columns, until nothing improves.
std::int64_t Matcher::improve(const Problem& p, std::vector<std::int32_t>& column_of) {
  std::int64_t best = objective(p, column_of.data());
  std::vector<std::int32_t>& next = trial_;
  next.resize(static_cast<std::size_t>(p.n));
  for (int round = 0; round < 8; ++round) {
    price_.resize(static_cast<std::size_t>(p.n * p.m));
    for (std::int64_t i = 0; i < p.n; ++i)
      for (std::int64_t j = 0; j < p.m; ++j)
        price_[i * p.m + j] =
            static_cast<std::int32_t>(contribution(p, column_of.data(), i, j) >> kShift);
    lap_.solve(price_.data(), p.n, p.m, next.data());
    const std::int64_t value = objective(p, next.data());
    if (value <= best) break;
    best = value;
    column_of.swap(next);
  }
  return exchange(p, column_of, best);
}

// Exchanges single columns while that improves. `best` is the value of `column_of`; returns the new.
std::int64_t Matcher::exchange(const Problem& p, std::vector<std::int32_t>& column_of,
                               std::int64_t best) {
  row_of_.assign(static_cast<std::size_t>(p.m), -1);
  for (std::int64_t i = 0; i < p.n; ++i)
    if (column_of[i] >= 0) row_of_[column_of[i]] = static_cast<std::int32_t>(i);
  auto worth = [&](std::int64_t row, std::int32_t column) {
    return column < 0 ? 0 : contribution(p, column_of.data(), row, column);
  };
  // c_ counts half of each edge: a pair never contributes more than this
  auto ceiling = [&](std::int64_t row, std::int32_t column) -> std::int64_t {
    if (column < 0) return 0;
    const std::int64_t at = row * p.m + column;
    return (2 * std::int64_t{c_[at]} - p.s[at]) << kShift;
  };
  for (bool better = true; better;) {
    better = false;
    for (std::int64_t i = 0; i < p.n; ++i) {
      std::int64_t mine = worth(i, column_of[i]);
      for (std::int64_t j = 0; j < p.m; ++j) {
        const std::int32_t old = column_of[i], column = static_cast<std::int32_t>(j);
        if (old == j || p.s[i * p.m + j] == 0) continue;
        const std::int32_t other = row_of_[j];
        const std::int64_t most = ceiling(i, column) + (other >= 0 ? ceiling(other, old) : 0);
        if (most <= mine) continue;
        std::int64_t before = mine;
        column_of[i] = kOpen;
        if (other >= 0) {
          before += worth(other, column);
          column_of[other] = kOpen;
        }
        std::int64_t after = most <= before ? 0 : worth(i, column);
        column_of[i] = column;
        if (other >= 0 && most > before) after += worth(other, old);
        if (after > before) {
          if (other >= 0) column_of[other] = old;
          row_of_[j] = static_cast<std::int32_t>(i);
          if (old >= 0) row_of_[old] = other;
          best += after - before;
          mine = worth(i, column);
          better = true;
        } else {
          column_of[i] = old;
          if (other >= 0) column_of[other] = column;
        }
      }
    }
  }
  return best;
}

// Iterated local search: moves a few columns in a circle, exchanges, keeps what is not worse. The
// choices come from a fixed sequence, so the result is the same everywhere.
std::int64_t Matcher::shake(const Problem& p, std::vector<std::int32_t>& column_of,
                            std::int64_t best, std::int64_t rounds) {
  std::uint64_t state = 0x9E3779B97F4A7C15ull;
  auto below = [&](std::int64_t limit) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(limit));
  };
  if (p.n < 2 || p.m < 2) return best;
  work_ = column_of;
  std::int64_t current = best;
  for (std::int64_t round = 0; round < rounds; ++round) {
    std::vector<std::int32_t>& trial = trial_;
    trial = work_;
    const std::int64_t moved = 2 + below(3);
    std::int64_t from = below(p.n);
    for (std::int64_t k = 0; k < moved; ++k) {
      const std::int64_t to = below(p.n);
      std::swap(trial[from], trial[to]);
      from = to;
    }
    if (p.m > p.n) {  // a row may also take a column that is free
      const auto column = static_cast<std::int32_t>(below(p.m));
      if (std::find(trial.begin(), trial.end(), column) == trial.end()) trial[from] = column;
    }
    const std::int64_t value = exchange(p, trial, objective(p, trial.data()));
    if (value < current) continue;
    current = value;
    work_ = trial;
    if (value > best) {
      best = value;
      column_of = trial;
    }
  }
  return best;
}

// Drops pairs that no matching better than the best known can use, again and again, for every pair
// less lowers the bounds of its neighbours. Returns the bound of what is left, in 1 / kOne.
std::int64_t Matcher::reduce(Problem& p, int fine, std::int64_t& best,
                             std::vector<std::int32_t>& columns) {
  if (p.s != kept_.data()) kept_.assign(p.s, p.s + p.n * p.m);
  p.s = kept_.data();
  std::vector<std::int32_t>& guess = trial_;
  guess.resize(static_cast<std::size_t>(p.n));
  for (;;) {
    bounds(p, nullptr, nullptr, fine);
    const std::int64_t ceiling = lap_.solve(c_.data(), p.n, p.m, guess.data());
    const std::int64_t value = objective(p, guess.data());
    if (value > best) {
      best = value;
      columns = guess;
    }
    const std::int64_t known = best >> kShift;
    if (ceiling >> fine <= known) return known;
    bool dropped = false;
    for (std::int64_t i = 0; i < p.n; ++i) {
      for (std::int64_t j = 0; j < p.m; ++j) {
        std::int32_t& s = kept_[static_cast<std::size_t>(i * p.m + j)];
        if (s == 0 || (ceiling - lap_.loss(i, j)) >> fine > known) continue;
        s = 0;
        dropped = true;
      }
    }
    if (!dropped) return ceiling >> fine;
  }
}

// Depth-first branch and bound over rows; every node solves the assignment that bounds it.
struct Matcher::Search {
  Matcher& m;
  const Problem& p;
  int fine;
  std::int64_t budget;
  std::int64_t best;  // units of objective()
  std::vector<std::int32_t> best_columns;
  std::vector<std::int32_t> column_of;
  std::vector<std::uint8_t> taken;
  std::int64_t open_bound = 0;  // largest bound of what the budget left unexplored
  bool complete = true;

  std::int64_t units(std::int64_t value) const { return value >> kShift; }

  // Upper bound of this node, in units of 1 / kOne, and a matching of the open rows.
  std::int64_t bound(std::vector<std::int32_t>& guess) {
    m.bounds(p, column_of.data(), taken.data(), fine);
    guess.resize(static_cast<std::size_t>(p.n));
    const std::int64_t rest = m.lap_.solve(m.c_.data(), p.n, p.m, guess.data());
    const std::int64_t fixed = m.objective(p, column_of.data());
    const std::int64_t scale = std::int64_t{1} << (kShift - fine);
    return ((fixed + scale - 1) / scale + rest) >> fine;
  }

  void offer(const std::vector<std::int32_t>& guess) {
    std::vector<std::int32_t>& full = m.work_;
    full = column_of;
    for (std::int64_t i = 0; i < p.n; ++i)
      if (full[i] == kOpen) full[i] = guess[i];
    const std::int64_t value = m.objective(p, full.data());
    if (value > best) {
      best = value;
      best_columns = full;
    }
  }

  void run(std::int64_t depth, std::int64_t ceiling, const std::vector<std::int32_t>& guess) {
    if (depth == p.n) return;
    const std::int64_t i = m.order_[depth];
    // the column that the bound's matching chose first, then the others by similarity, then none
    std::vector<std::int32_t> columns;
    for (std::int64_t j = 0; j < p.m; ++j)
      if (!taken[j] && p.s[i * p.m + j] > 0) columns.push_back(static_cast<std::int32_t>(j));
    const std::int32_t first = guess[i];
    std::stable_sort(columns.begin(), columns.end(), [&](std::int32_t x, std::int32_t y) {
      if ((x == first) != (y == first)) return x == first;
      return p.s[i * p.m + x] > p.s[i * p.m + y];
    });
    columns.push_back(-1);
    std::vector<std::int32_t> inner;
    for (std::int32_t j : columns) {
      if (ceiling <= units(best)) return;
      if (budget <= 0) {
        complete = false;
        open_bound = std::max(open_bound, ceiling);
        return;
      }
      --budget;
      column_of[i] = j;
      if (j >= 0) taken[j] = 1;
      const std::int64_t limit = std::min(ceiling, bound(inner));
      if (limit > units(best)) {
        offer(inner);
        if (limit > units(best)) run(depth + 1, limit, inner);
      }
      column_of[i] = kOpen;
      if (j >= 0) taken[j] = 0;
    }
  }
};

// The best value, or a bound on it when the node budget ends, from a good matching and its value. A
// short search settles most pairs; for the others a better start is worth its price.
std::int64_t Matcher::prove(Problem& p, std::int64_t node_budget, std::int64_t& value,
                            std::vector<std::int32_t>& columns) {
  bounds(p, nullptr, nullptr, 0);
  const std::int64_t largest = c_.empty() ? 0 : *std::max_element(c_.begin(), c_.end());
  int fine = 0;  // as many extra bits as the narrow assignment can take
  while (fine < 6 &&
         (largest << (fine + 2)) * (std::min(p.n, p.m) + 2) < (std::int64_t{1} << 22))
    ++fine;
  std::int64_t bound = reduce(p, fine, value, columns);
  std::int64_t spent = 0;
  for (std::int64_t budget : {std::min(node_budget, kFirstSearch), node_budget}) {
    if (bound <= value >> kShift) break;
    if (spent > 0 || node_budget <= kFirstSearch) {
      bounds(p, nullptr, nullptr, 0);  // exchange() wants them unscaled
      value = shake(p, columns, value, kShakes * p.n);
      bound = std::min(bound, reduce(p, fine, value, columns));
    }
    Search search{*this, p, fine, budget - spent, value, columns, {}, {}};
    search.column_of.assign(static_cast<std::size_t>(p.n), kOpen);
    search.taken.assign(static_cast<std::size_t>(p.m), 0);
    bounds(p, nullptr, nullptr, fine);
    order_rows(p);
    const std::vector<std::int32_t> guess = columns;
    search.run(0, bound, guess);
    columns = search.best_columns;
    value = search.best;
    const std::int64_t known = value >> kShift;
    bound = search.complete ? known : std::min(bound, std::max(known, search.open_bound));
    if (budget == node_budget) break;
    spent = budget;
  }
  return std::max(bound, value >> kShift);
}

MatchOutcome Matcher::match(Mode mode, const std::int32_t* similarity, std::int64_t n, std::int64_t m,
                            const EdgeList& a, const EdgeList& b, const std::int32_t* edge_half,
                            std::int64_t node_budget, std::int32_t* assigned) {
  Problem p{similarity, n, m, {edge_half[0], edge_half[1]}};
  na_.build(a, n);
  nb_.build(b, m);
  bounds(p, nullptr, nullptr, 0);
  std::vector<std::int32_t>& columns = columns_;
  columns.assign(static_cast<std::size_t>(n), -1);
  const std::int64_t ceiling = lap_.solve(c_.data(), n, m, columns.data());
  MatchOutcome out{ceiling, ceiling, true};
  if (mode != Mode::kRelaxed) {
    std::int64_t value = improve(p, columns);
    if (n == m && (value >> kShift) < ceiling) {  // equal graphs must score exactly 1
      trial_.resize(static_cast<std::size_t>(n));
      for (std::int64_t i = 0; i < n; ++i) trial_[i] = static_cast<std::int32_t>(i);
      const std::int64_t straight = objective(p, trial_.data());
      if (straight > value) {
        value = straight;
        columns = trial_;
      }
    }
    out.value = value >> kShift;
    out.proven = out.value == ceiling;
    if (mode == Mode::kExact && !out.proven) {
      out.bound = prove(p, node_budget, value, columns);
      out.value = value >> kShift;
      out.proven = out.bound == out.value;
    }
  }
  if (assigned) std::copy(columns.begin(), columns.end(), assigned);
  return out;
}

// Most constrained first: rows with much to gain, then rows that are next to those.
void Matcher::order_rows(const Problem& p) {
  order_.clear();
  std::vector<std::int64_t> weight(static_cast<std::size_t>(p.n), 0);
  for (std::int64_t i = 0; i < p.n; ++i)
    for (std::int64_t j = 0; j < p.m; ++j) weight[i] = std::max<std::int64_t>(weight[i], c_[i * p.m + j]);
  std::vector<std::uint8_t> used(static_cast<std::size_t>(p.n), 0);
  std::vector<std::int64_t> near(static_cast<std::size_t>(p.n), 0);
  for (std::int64_t step = 0; step < p.n; ++step) {
    std::int64_t pick = -1;
    for (std::int64_t i = 0; i < p.n; ++i)
      if (!used[i] && (pick < 0 || near[i] > near[pick] ||
                       (near[i] == near[pick] && weight[i] > weight[pick])))
        pick = i;
    used[pick] = 1;
    order_.push_back(static_cast<std::int32_t>(pick));
    for (int list = 0; list < kLists; ++list)
      for (const std::int32_t* k = na_.begin(pick, list); k != na_.end(pick, list); ++k)
        near[*k] += p.half[list / 2];
  }
}

}  // namespace compact
