#include "problem.h"

#include <algorithm>
#include <iterator>

#include "similarity.h"

namespace compact {

void Neighbours::build(const EdgeList& edges, std::int64_t n) {
  start_.assign(static_cast<std::size_t>(n * kLists + 1), 0);
  node_.resize(static_cast<std::size_t>(2 * edges.size));
  const auto list = [](std::int32_t v, int type, int direction) {
    return static_cast<std::size_t>(v) * kLists + static_cast<std::size_t>(type * 2 + direction);
  };
  for (std::int64_t e = 0; e < edges.size; ++e) {
    ++start_[list(edges.source[e], edges.type[e], 0) + 1];
    ++start_[list(edges.target[e], edges.type[e], 1) + 1];
  }
  for (std::size_t i = 1; i < start_.size(); ++i) start_[i] += start_[i - 1];
  cursor_.assign(start_.begin(), start_.end() - 1);
  for (std::int64_t e = 0; e < edges.size; ++e) {
    const auto out = list(edges.source[e], edges.type[e], 0);
    const auto in = list(edges.target[e], edges.type[e], 1);
    node_[static_cast<std::size_t>(cursor_[out]++)] = edges.target[e];
    node_[static_cast<std::size_t>(cursor_[in]++)] = edges.source[e];
  }
  measure();
}

void Neighbours::restrict_to(const Neighbours& whole, const std::vector<std::int32_t>& nodes,
                             const std::int32_t* place) {
  start_.resize(nodes.size() * kLists + 1);
  node_.clear();
  start_[0] = 0;
  std::size_t at = 0;
  for (std::int32_t v : nodes) {
    for (int list = 0; list < kLists; ++list) {
      for (const std::int32_t* w = whole.begin(v, list); w != whole.end(v, list); ++w)
        if (place[*w] >= 0) node_.push_back(place[*w]);
      start_[++at] = static_cast<std::int32_t>(node_.size());
    }
  }
  measure();
}

void Neighbours::measure() {
  std::fill(std::begin(longest_), std::end(longest_), 0);
  for (std::size_t at = 0; at + 1 < start_.size(); at += kLists)
    for (std::size_t list = 0; list < kLists; ++list)
      longest_[list] = std::max(longest_[list], start_[at + list + 1] - start_[at + list]);
}

bool Problem::narrow() const {
  std::int64_t most = 0;
  for (int list = 0; list < kLists; ++list)
    most += 2 * half[list / 2] * std::max(a->longest(list), b->longest(list));
  return most < (std::int64_t{1} << 31) / kOne;
}

std::int64_t Problem::objective(const std::int32_t* column_of) const {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t j = column_of[i];
    if (j < 0) continue;
    const std::int64_t mine = similarity(i, j);
    total += mine << kShift;
    for (int type = 0; type < kEdgeTypes; ++type) {
      for (const std::int32_t* k = a->begin(i, 2 * type); k != a->end(i, 2 * type); ++k) {
        const std::int32_t l = column_of[*k];
        if (l >= 0 && b->has(j, 2 * type, l)) total += 2 * half[type] * mine * similarity(*k, l);
      }
    }
  }
  return total;
}

void Partial::start(const Problem& problem) {
  p_ = &problem;
  beside_.assign(static_cast<std::size_t>(problem.n * problem.m), 0);
  column_of_.assign(static_cast<std::size_t>(problem.n), -1);
  row_of_.assign(static_cast<std::size_t>(problem.m), -1);
  value_ = 0;
}

void Partial::start(const Problem& problem, const std::int32_t* column_of) {
  start(problem);
  for (std::int64_t i = 0; i < problem.n; ++i)
    if (column_of[i] >= 0) add(i, column_of[i]);
}

void Partial::change(std::int64_t i, std::int64_t j, std::int64_t sign) {
  const std::int64_t twice = 2 * sign * p_->similarity(i, j);
  for (int list = 0; list < kLists; ++list) {
    const std::int32_t *b = p_->b->begin(j, list), *b_end = p_->b->end(j, list);
    const std::int64_t by = twice * p_->half[list / 2];
    for (const std::int32_t *k = p_->a->begin(i, list), *a_end = p_->a->end(i, list); k != a_end; ++k)
      for (const std::int32_t* l = b; l != b_end; ++l) beside_[*k * p_->m + *l] += by;
  }
}

void Partial::add(std::int64_t i, std::int64_t j) {
  value_ += worth(i, j);
  change(i, j, 1);
  column_of_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(j);
  row_of_[static_cast<std::size_t>(j)] = static_cast<std::int32_t>(i);
}

void Partial::remove(std::int64_t i, std::int64_t j) {
  change(i, j, -1);
  value_ -= worth(i, j);
  column_of_[static_cast<std::size_t>(i)] = -1;
  row_of_[static_cast<std::size_t>(j)] = -1;
}

}  // namespace compact
