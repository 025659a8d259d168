#include "search.h"

#include <algorithm>

namespace compact {

namespace {
constexpr std::int64_t kFirstSearch = 300;  // assignments before a better start is worth its price
constexpr std::int64_t kShakes = 14;        // rounds of iterated local search a row
}  // namespace

ProofSearch::Node& ProofSearch::at(std::size_t depth) {
  while (nodes_.size() <= depth) nodes_.emplace_back();
  return nodes_[depth];
}

// A matching of what is open, with what is fixed.
void ProofSearch::offer(const Node& node) {
  full_ = fixed_.columns();
  for (std::size_t r = 0; r < node.rows.size(); ++r)
    if (guess_[r] >= 0) full_[static_cast<std::size_t>(node.rows[r])] = node.columns[guess_[r]];
  const std::int64_t value = p_->objective(full_.data());
  if (value > best_) {
    best_ = value;
    best_columns_ = full_;
  }
}

// Bounds the node, drops pairs that nothing better than the best known can use (every pair less
// lowers the bounds of its neighbours), and chooses where to branch. False: nothing better is here.
bool ProofSearch::bound(Node& node) {
  const auto rows = static_cast<std::int64_t>(node.rows.size());
  const auto columns = static_cast<std::int64_t>(node.columns.size());
  if (rows == 0 || columns == 0) {
    guess_.assign(node.rows.size(), -1);
    offer(node);
    return false;
  }
  place_a_.assign(static_cast<std::size_t>(p_->n), -1);
  place_b_.assign(static_cast<std::size_t>(p_->m), -1);
  for (std::int64_t r = 0; r < rows; ++r) place_a_[node.rows[r]] = static_cast<std::int32_t>(r);
  for (std::int64_t c = 0; c < columns; ++c) place_b_[node.columns[c]] = static_cast<std::int32_t>(c);
  a_.restrict_to(*p_->a, node.rows, place_a_.data());
  b_.restrict_to(*p_->b, node.columns, place_b_.data());
  settled_.resize(node.s.size());
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t* beside = fixed_.beside(node.rows[r]);
    for (std::int64_t c = 0; c < columns; ++c) settled_[r * columns + c] = beside[node.columns[c]];
  }
  c_.resize(node.s.size());
  guess_.resize(node.rows.size());
  const std::int64_t scale = std::int64_t{1} << (kShift - fine_);
  const std::int64_t fixed = (fixed_.value() + scale - 1) / scale;
  for (;;) {
    bounds_.compute(node.s.data(), rows, columns, a_, b_, p_->half, settled_.data(), narrow_, fine_,
                    c_.data());
    const std::int64_t rest = lap_.solve(c_.data(), rows, columns, guess_.data());
    node.limit = std::min(node.limit, (fixed + rest) >> fine_);
    --budget_;
    if (node.limit <= best_ >> kShift) return false;
    offer(node);
    const std::int64_t known = best_ >> kShift;
    if (node.limit <= known) return false;
    std::int64_t dropped = 0, left = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        std::int32_t& s = node.s[static_cast<std::size_t>(r * columns + c)];
        if (s == 0) continue;
        if ((fixed + rest - lap_.loss(r, c)) >> fine_ <= known)
          s = 0, ++dropped;
        else
          ++left;
      }
    }
    if (left == 0) return false;  // nothing but the fixed pairs, which have been offered
    if (8 * dropped <= left) {
      branch(node, fixed + rest);
      return true;
    }
  }
}

// Decides the row with the fewest choices left, the most promising choice first.
void ProofSearch::branch(Node& node, std::int64_t total) {
  const std::int64_t known = best_ >> kShift;
  const auto columns = static_cast<std::int64_t>(node.columns.size());
  std::int64_t fewest = columns + 2, weight = 0;
  for (std::size_t r = 0; r < node.rows.size(); ++r) {
    std::int64_t count = 0, largest = 0;
    for (std::int64_t c = 0; c < columns; ++c) {
      count += node.s[r * columns + c] > 0;
      largest = std::max<std::int64_t>(largest, c_[r * columns + c]);
    }
    if (count == 0) continue;  // stays unmatched
    const auto none = lap_.loss_of_none(static_cast<std::int64_t>(r));
    count += (total - none) >> fine_ > known;
    if (count < fewest || (count == fewest && largest > weight)) {
      fewest = count;
      weight = largest;
      node.branch = r;
    }
  }
  node.choices.clear();
  const auto row = static_cast<std::int64_t>(node.branch);
  for (std::int64_t c = 0; c < columns; ++c)
    if (node.s[row * columns + c] > 0)
      node.choices.push_back({static_cast<std::int32_t>(c), (total - lap_.loss(row, c)) >> fine_});
  node.choices.push_back({-1, (total - lap_.loss_of_none(row)) >> fine_});
  std::stable_sort(node.choices.begin(), node.choices.end(),
                   [](const Choice& x, const Choice& y) { return x.limit > y.limit; });
}

// What is left of `parent` when its row `row` has taken `column`, or nothing.
void ProofSearch::inherit(const Node& parent, Node& child, std::size_t row, std::int32_t column) {
  child.rows = parent.rows;
  child.rows.erase(child.rows.begin() + static_cast<std::ptrdiff_t>(row));
  child.columns = parent.columns;
  if (column >= 0) child.columns.erase(child.columns.begin() + column);
  child.s.clear();
  const auto columns = static_cast<std::int64_t>(parent.columns.size());
  for (std::size_t r = 0; r < parent.rows.size(); ++r) {
    if (r == row) continue;
    const std::int32_t* from = parent.s.data() + static_cast<std::int64_t>(r) * columns;
    if (column < 0) {
      child.s.insert(child.s.end(), from, from + columns);
    } else {
      child.s.insert(child.s.end(), from, from + column);
      child.s.insert(child.s.end(), from + column + 1, from + columns);
    }
  }
}

// The choices of a node that bound() has prepared.
void ProofSearch::descend(std::size_t depth) {
  Node& node = at(depth);
  const std::int64_t row = node.rows[node.branch];
  for (const Choice& choice : node.choices) {
    const std::int64_t limit = std::min(node.limit, choice.limit);
    if (limit <= best_ >> kShift) continue;
    if (budget_ <= 0) {
      complete_ = false;
      open_limit_ = std::max(open_limit_, limit);
      continue;
    }
    const std::int64_t column = choice.column < 0 ? -1 : node.columns[choice.column];
    Node& child = at(depth + 1);
    inherit(node, child, node.branch, choice.column);
    child.limit = limit;
    if (column >= 0) fixed_.add(row, column);
    if (bound(child)) descend(depth + 1);
    if (column >= 0) fixed_.remove(row, column);
  }
}

std::int64_t ProofSearch::run(const Problem& p, std::int64_t node_budget, std::int64_t& value,
                              std::vector<std::int32_t>& columns) {
  p_ = &p;
  narrow_ = p.narrow();
  best_ = value;
  best_columns_ = columns;
  c_.resize(static_cast<std::size_t>(p.n * p.m));
  bounds_.compute(p.s, p.n, p.m, *p.a, *p.b, p.half, nullptr, narrow_, 0, c_.data());
  const std::int64_t largest = c_.empty() ? 0 : *std::max_element(c_.begin(), c_.end());
  // c_ counts half of each edge: a pair never adds more than this
  most_.assign(static_cast<std::size_t>(p.m), 0);
  for (std::int64_t i = 0; i < p.n; ++i)
    for (std::int64_t j = 0; j < p.m; ++j)
      most_[j] = std::max(most_[j], (2 * std::int64_t{c_[i * p.m + j]} - p.similarity(i, j)) << kShift);
  fine_ = 0;  // as many extra bits as the narrow assignment can take
  while (fine_ < 6 &&
         (largest << (fine_ + 2)) * (std::min(p.n, p.m) + 2) < (std::int64_t{1} << 22))
    ++fine_;
  Node& root = at(0);
  root.rows.resize(static_cast<std::size_t>(p.n));
  root.columns.resize(static_cast<std::size_t>(p.m));
  for (std::int64_t i = 0; i < p.n; ++i) root.rows[i] = static_cast<std::int32_t>(i);
  for (std::int64_t j = 0; j < p.m; ++j) root.columns[j] = static_cast<std::int32_t>(j);
  root.s.assign(p.s, p.s + p.n * p.m);
  root.limit = std::int64_t{1} << 62;
  fixed_.start(p);
  std::int64_t bound_found = root.limit;
  std::int64_t left = node_budget;
  // A short search settles most pairs; for the others a better start is worth its price.
  for (std::int64_t budget : {std::min(node_budget, kFirstSearch), node_budget}) {
    if (budget == node_budget) {
      const std::int64_t shaken = local_.shake(p, best_columns_, kShakes * p.n, most_);
      best_ = std::max(best_, shaken);
    }
    complete_ = true;
    open_limit_ = 0;
    budget_ = std::min(budget, left);
    left -= budget_;
    if (bound(root)) descend(0);
    const std::int64_t known = best_ >> kShift;
    bound_found = complete_ ? known : std::min(bound_found, std::max(known, open_limit_));
    if (complete_ || budget == node_budget) break;
  }
  value = best_;
  columns = best_columns_;
  return std::max(bound_found, value >> kShift);
}

}  // namespace compact
