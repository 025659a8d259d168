// A matching problem: similarities and edges of two graphs, and what a partial matching makes of them.
#pragma once

#include <cstdint>
#include <vector>

#include "graph.h"

namespace compact {

struct EdgeList {  // of one graph
  const std::int32_t* source = nullptr;
  const std::int32_t* target = nullptr;
  const std::uint8_t* type = nullptr;
  std::int64_t size = 0;
};

constexpr int kShift = 23;  // S * S * half is in units of 1 / (kOne << kShift)
constexpr int kLists = 2 * kEdgeTypes;

// Neighbours of each node as CSR, by list: type * 2 + direction. List l of v holds w exactly where
// list l ^ 1 of w holds v.
class Neighbours {
 public:
  void build(const EdgeList& edges, std::int64_t n);
  // Those of `whole` among the nodes with place[v] >= 0, numbered by place; `nodes` are these nodes.
  void restrict_to(const Neighbours& whole, const std::vector<std::int32_t>& nodes,
                   const std::int32_t* place);
  const std::int32_t* begin(std::int64_t v, int list) const {
    return node_.data() + start_[static_cast<std::size_t>(v * kLists + list)];
  }
  const std::int32_t* end(std::int64_t v, int list) const {
    return node_.data() + start_[static_cast<std::size_t>(v * kLists + list + 1)];
  }
  bool has(std::int64_t v, int list, std::int32_t w) const {
    for (const std::int32_t *at = begin(v, list), *stop = end(v, list); at != stop; ++at)
      if (*at == w) return true;
    return false;
  }
  std::int64_t longest(int list) const { return longest_[list]; }  // the most that a node has

 private:
  void measure();
  std::vector<std::int32_t> start_, node_, cursor_;
  std::int32_t longest_[kLists] = {};
};

struct Problem {
  const std::int32_t* s;  // [n * m], units of 1 / kOne
  std::int64_t n, m;
  std::int64_t half[kEdgeTypes];
  const Neighbours *a, *b;

  // Does no sum of h S over neighbours, those of pairs already fixed counted twice, leave 31 bits?
  bool narrow() const;
  std::int64_t similarity(std::int64_t i, std::int64_t j) const { return s[i * m + j]; }
  // F of a whole matching, in units of 1 / (kOne << kShift).
  std::int64_t objective(const std::int32_t* column_of) const;
};

// A matching that grows and shrinks pair by pair, with its value and, for every pair, what that pair
// would add.
class Partial {
 public:
  void start(const Problem& problem);
  void start(const Problem& problem, const std::int32_t* column_of);
  void add(std::int64_t i, std::int64_t j);
  void remove(std::int64_t i, std::int64_t j);

  // What the pair adds to F beside the pairs that are there, in units of objective().
  std::int64_t worth(std::int64_t i, std::int64_t j) const {
    const std::size_t at = static_cast<std::size_t>(i * p_->m + j);
    return p_->s[at] * ((std::int64_t{1} << kShift) + beside_[at]);
  }
  // Sum of 2 h S over the pairs that are joined to (i, j) by agreeing edges.
  const std::int64_t* beside(std::int64_t i) const { return beside_.data() + i * p_->m; }
  std::int64_t value() const { return value_; }
  std::int32_t column_of(std::int64_t i) const { return column_of_[static_cast<std::size_t>(i)]; }
  std::int32_t row_of(std::int64_t j) const { return row_of_[static_cast<std::size_t>(j)]; }
  const std::vector<std::int32_t>& columns() const { return column_of_; }

 private:
  void change(std::int64_t i, std::int64_t j, std::int64_t sign);
  const Problem* p_ = nullptr;
  std::vector<std::int64_t> beside_;
  std::vector<std::int32_t> column_of_, row_of_;
  std::int64_t value_ = 0;
};

}  // namespace compact
