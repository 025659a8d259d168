// Linear sum assignment (maximum weight), by shortest augmenting paths.
#pragma once

#include <cstdint>
#include <vector>

namespace compact {

// Weights are >= 0; rows and columns may stay unmatched, at no gain (a pair of weight 0 counts as
// unmatched). The VALUE is unique; among several optima the one returned is the same everywhere.
//
// After R. Jonker and A. Volgenant, Computing 38 (1987) 325-340, in the form of D. F. Crouse, IEEE
// Trans. Aerospace Electronic Systems 52 (2016) 1679-1696: one Dijkstra search a row.
class Assignment {
 public:
  // weight[i * columns + j]; assigned[i] becomes the column of row i, or -1.
  std::int64_t solve(const std::int32_t* weight, std::int64_t rows, std::int64_t columns,
                     std::int32_t* assigned = nullptr);

 private:
  template <class T>
  struct Duals {
    std::vector<T> u, v, best;
  };
  template <class T>
  void search(const std::int32_t* weight, std::int64_t n, std::int64_t m, Duals<T>& duals);

  Duals<std::int32_t> narrow_;  // while no sum of weights can overflow 32 bits
  Duals<std::int64_t> wide_;
  std::vector<std::int32_t> flipped_, from_, row_of_, column_of_, closed_, reached_;
};

}  // namespace compact
