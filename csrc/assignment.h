// Linear sum assignment (maximum weight).
#pragma once

#include <cstdint>
#include <vector>

namespace compact {

// Weights are >= 0; rows and columns may stay unmatched, at no gain (a pair of weight 0 counts as
// unmatched). The VALUE is unique; among several optima the one returned is the same everywhere.
//
// After R. Jonker and A. Volgenant, Computing 38 (1987) 325-340: augmenting row reduction (rows bid
// for their best column, at most twice), then one shortest augmenting path for every row left.
// Rectangular problems keep the price of unassigned columns at 0, as D. F. Crouse does, IEEE Trans.
// Aerospace Electronic Systems 52 (2016) 1679-1696.
class Assignment {
 public:
  // weight[i * columns + j]; assigned[i] becomes the column of row i, or -1.
  std::int64_t solve(const std::int32_t* weight, std::int64_t rows, std::int64_t columns,
                     std::int32_t* assigned = nullptr);

  // After solve(): by how much, at least, the value falls if row i takes column j, or none.
  std::int64_t loss(std::int64_t i, std::int64_t j) const;
  std::int64_t loss_of_none(std::int64_t i) const;

 private:
  template <class T>
  struct Prices {
    std::vector<T> cost, v, best;
  };
  template <class T, class Scan>
  void search(std::int64_t n, std::int64_t m, Prices<T>& prices);
  template <class T>
  void load(const std::int32_t* weight, std::int64_t rows, std::int64_t columns, Prices<T>& prices);

  Prices<std::int32_t> narrow_;  // while no sum of costs can overflow 32 bits
  Prices<std::int64_t> wide_;
  bool is_narrow_ = true, flipped_ = false;
  std::int64_t stride_ = 0;
  std::vector<std::int32_t> from_, row_of_, column_of_, closed_, reached_, free_;
};

}  // namespace compact
