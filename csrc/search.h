// The best matching, proven: branch and bound over rows, every node bounded by one assignment.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "assignment.h"
#include "bounds.h"
#include "local_search.h"
#include "problem.h"

namespace compact {

class ProofSearch {
 public:
  // Improves `columns`, of value `value` (units of Problem::objective()), to the best matching.
  // Returns a bound that no matching exceeds, in units of 1 / kOne: the value itself when the search
  // ends within `node_budget` assignments.
  std::int64_t run(const Problem& p, std::int64_t node_budget, std::int64_t& value,
                   std::vector<std::int32_t>& columns);

 private:
  struct Choice {
    std::int32_t column;  // -1: none
    std::int64_t limit;   // no matching with it has more
  };
  struct Node {  // what is left at one depth: open rows and columns, and the pairs still of use
    std::vector<std::int32_t> rows, columns, s;
    std::vector<Choice> choices;
    std::int64_t limit = 0;
    std::size_t branch = 0;  // the row, among `rows`, that is decided here
  };
  bool bound(Node& node);
  void branch(Node& node, std::int64_t rest);
  void descend(std::size_t depth);
  Node& at(std::size_t depth);
  void inherit(const Node& parent, Node& child, std::size_t row, std::int32_t column);
  void offer(const Node& node);

  const Problem* p_ = nullptr;
  bool narrow_ = true, complete_ = true;
  int fine_ = 0;
  std::int64_t budget_ = 0, best_ = 0, open_limit_ = 0;
  std::vector<std::int32_t> best_columns_;
  std::deque<Node> nodes_;  // a node stays where it is while deeper ones come
  Partial fixed_;
  Bounds bounds_;
  Assignment lap_;
  LocalSearch local_;
  Neighbours a_, b_;
  std::vector<std::int64_t> settled_, most_;
  std::vector<std::int32_t> c_, guess_, full_, place_a_, place_b_;
};

}  // namespace compact
