// Better matchings from good ones: reassignment, exchanges, and a walk from one local best to another.
#pragma once

#include <cstdint>
#include <vector>

#include "assignment.h"
#include "problem.h"

namespace compact {

class LocalSearch {
 public:
  // Reassigns all rows at once, each pair priced by its worth beside the present matching, while that
  // improves; then exchange(). Returns the value, in units of Problem::objective().
  std::int64_t improve(const Problem& p, std::vector<std::int32_t>& column_of);

  // Iterated local search: moves a few columns in a circle, half of the time along an edge, exchanges,
  // keeps what is hardly worse and remembers the best. The choices come from a fixed sequence: the same
  // result everywhere.
  // most[m]: what no pair of the column adds beside any matching, in units of Problem::objective().
  std::int64_t shake(const Problem& p, std::vector<std::int32_t>& column_of, std::int64_t rounds,
                     const std::vector<std::int64_t>& most);

 private:
  // Gives rows other columns, in exchange where these are taken, until no such step improves. Looks
  // at all rows, or at those whose worth has changed since they were last looked at.
  void exchange(const Problem& p);
  void exchange_stale(const Problem& p, const std::vector<std::int64_t>& most);
  bool exchange_row(const Problem& p, std::int32_t i, const std::int64_t* most);
  std::int64_t gain(const Problem& p, std::int32_t i, std::int32_t column) const;
  void price(std::int64_t i);
  void swap(const Problem& p, std::int32_t i, std::int32_t column);
  void add(const Problem& p, std::int64_t i, std::int64_t j);
  void remove(const Problem& p, std::int64_t i, std::int64_t j);
  void mark_stale(const Problem& p, std::int64_t i);
  void begin(const Problem& p, const std::int32_t* column_of);
  void restart(const Problem& p, const std::int32_t* column_of);
  std::int64_t between(const Problem& p, std::int64_t i, std::int64_t j, std::int64_t k,
                       std::int64_t l) const;

  // [n * n] and [m * m]: in which lists of the first node the second is; worth of a set of lists
  std::vector<std::uint8_t> lists_a_, lists_b_;
  std::int64_t worth_of_lists_[1 << kLists] = {};
  std::vector<std::uint8_t> stale_;  // [n]
  std::vector<std::int32_t> queue_;  // the stale rows
  std::vector<std::int64_t> here_;  // [m]: worth of the column's pair, 0 if it is free
  Partial now_;
  Assignment lap_;
  std::vector<std::int32_t> price_, next_, kept_;
};

}  // namespace compact
