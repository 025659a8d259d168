// Matching two step graphs: nodes by similarity, edges by agreement of their ends.
//
// With S in units of 1/kOne, a matching x (one to one, partial) has the value
//     F(x) = sum_ij S_ij x_ij  +  sum over typed directed edges (i,k) and (j,l) of the same type of
//            2 h_type S_ij S_kl x_ij x_kl,         2 h_type = lambda * edge weight.
// fast: value of a good matching. exact: the best value, or bounds when the node budget ends.
// relaxed: one assignment on C_ij = S_ij (1 + sum_type,direction h_type min(best neighbours of i, of
// j)); it is never below exact. All are the same for (a, b) and (b, a); relaxed, and exact where it is
// proven, also for any numbering of the nodes.
#pragma once

#include <cstdint>
#include <vector>

#include "assignment.h"
#include "bounds.h"
#include "local_search.h"
#include "problem.h"
#include "search.h"
#include "similarity.h"

namespace compact {

enum class Mode : std::uint8_t { kRelaxed = 0, kExact = 1, kFast = 2 };

struct MatchOutcome {
  std::int64_t value = 0;  // units of 1 / kOne, as are the bounds
  std::int64_t bound = 0;  // no matching has more
  bool proven = true;      // value == bound, up to rounding
};

// Value of matching a graph with itself, node by node, in the mode's rounding; `self` is its nodes'
// similarity with themselves.
std::int64_t self_value(Mode mode, const std::int32_t* self, std::int64_t n, const EdgeList& edges,
                        const std::int32_t* edge_half);

class Matcher {
 public:
  // similarity[n * m]; edges of the two graphs; assigned[n] (may be null) becomes the matching.
  MatchOutcome match(Mode mode, const std::int32_t* similarity, std::int64_t n, std::int64_t m,
                     const EdgeList& a, const EdgeList& b, const std::int32_t* edge_half,
                     std::int64_t node_budget, std::int32_t* assigned);

 private:
  // The matching goes to columns_.
  MatchOutcome match_rows(Mode mode, const std::int32_t* similarity, std::int64_t n, std::int64_t m,
                          const EdgeList& a, const EdgeList& b, const std::int32_t* edge_half,
                          std::int64_t node_budget);

  Neighbours a_, b_;
  Bounds bounds_;
  Assignment lap_;
  LocalSearch local_;
  ProofSearch proof_;
  std::vector<std::int32_t> c_, columns_, straight_, turned_;
};

}  // namespace compact
