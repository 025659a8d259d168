// Matching two step graphs: nodes by similarity, edges by agreement of their ends.
//
// With S in units of 1/kOne, a matching x (one to one, partial) has the value
//     F(x) = sum_ij S_ij x_ij  +  sum over typed directed edges (i,k) and (j,l) of the same type of
//            2 h_type S_ij S_kl x_ij x_kl,         2 h_type = lambda * edge weight.
// fast: value of a good matching. exact: the best value, or bounds when the node budget ends.
// relaxed: one assignment on C_ij = S_ij (1 + sum_type,direction h_type min(best neighbours of i, of
// j)); it is never below exact, and the same for any numbering of the nodes.
#pragma once

#include <cstdint>
#include <vector>

#include "assignment.h"
#include "similarity.h"

namespace compact {

enum class Mode : std::uint8_t { kRelaxed = 0, kExact = 1, kFast = 2 };

struct EdgeList {  // of one graph
  const std::int32_t* source = nullptr;
  const std::int32_t* target = nullptr;
  const std::uint8_t* type = nullptr;
  std::int64_t size = 0;
};

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
  static constexpr std::int32_t kOpen = -2;  // a row not decided yet; -1: decided to stay unmatched

  struct Problem {
    const std::int32_t* s;
    std::int64_t n, m;
    std::int64_t half[kEdgeTypes];
  };
  struct Neighbours {  // list (type * 2 + direction) of each node, as CSR
    std::vector<std::int32_t> start, node, cursor;
    void build(const EdgeList& edges, std::int64_t n);
    const std::int32_t* begin(std::int64_t v, int list) const {
      return node.data() + start[static_cast<std::size_t>(v * 2 * kEdgeTypes + list)];
    }
    const std::int32_t* end(std::int64_t v, int list) const {
      return node.data() + start[static_cast<std::size_t>(v * 2 * kEdgeTypes + list + 1)];
    }
  };
  struct Search;

  void bounds(const Problem& p, const std::int32_t* column_of, const std::uint8_t* taken, int fine);
  std::int64_t objective(const Problem& p, const std::int32_t* column_of) const;
  std::int64_t contribution(const Problem& p, const std::int32_t* column_of, std::int64_t i,
                            std::int64_t j) const;
  std::int64_t improve(const Problem& p, std::vector<std::int32_t>& column_of);
  std::int64_t exchange(const Problem& p, std::vector<std::int32_t>& column_of, std::int64_t best);
  std::int64_t shake(const Problem& p, std::vector<std::int32_t>& column_of, std::int64_t best,
                     std::int64_t rounds);
  std::int64_t reduce(Problem& p, int fine, std::int64_t& best, std::vector<std::int32_t>& columns);
  std::int64_t prove(Problem& p, std::int64_t node_budget, std::int64_t& value,
                     std::vector<std::int32_t>& columns);
  void order_rows(const Problem& p);

  Assignment lap_;
  Neighbours na_, nb_;
  std::vector<std::int32_t> kept_, c_, price_, columns_, trial_, row_of_, work_, order_;
};

}  // namespace compact
