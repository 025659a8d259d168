// Upper bounds on what each pair of nodes can contribute to a matching: the weights of the relaxed
// assignment.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace compact {

// C_ij = S_ij (1 + settled_ij + sum over lists of h min(left, right)), with left the sum over the
// list's neighbours k of i of the best S_kl among the neighbours l of j, and right the other way
// round: half of each edge, at its best. settled counts edges to pairs that are fixed, in full.
class Bounds {
 public:
  // s[rows * columns] in units of 1 / kOne and the neighbours of both sides, all of whose ends are
  // rows and columns. settled[rows * columns] (may be null) in units of Partial::beside(). `narrow`
  // is Problem::narrow(). Fills out[rows * columns] in units of 1 / (kOne << fine), rounded up.
  void compute(const std::int32_t* s, std::int64_t rows, std::int64_t columns, const Neighbours& a,
               const Neighbours& b, const std::int64_t* half, const std::int64_t* settled,
               bool narrow, int fine, std::int32_t* out);

 private:
  void plain(const std::int32_t* s, std::int64_t rows, std::int64_t columns, const Neighbours& a,
             const Neighbours& b, const std::int64_t* half, const std::int64_t* settled, int fine,
             std::int32_t* out);
  void vector(const std::int32_t* s, std::int64_t rows, std::int64_t columns, const Neighbours& a,
              const Neighbours& b, const std::int64_t* half, const std::int64_t* settled, int fine,
              std::int32_t* out);
  std::vector<std::int32_t> s_, turned_, best_, best_turned_, sum_, sum_turned_, total_;
  std::vector<std::int32_t> row_best_;
  std::vector<std::int64_t> row_sum_, wide_total_;
};

}  // namespace compact
