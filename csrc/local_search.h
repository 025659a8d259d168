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

  // Iterated local search: moves a few columns in a circle, exchanges, keeps what is hardly worse and
  // remembers the best. The choices come from a fixed sequence: the same result everywhere.
  std::int64_t shake(const Problem& p, std::vector<std::int32_t>& column_of, std::int64_t rounds);

 private:
  // Gives rows other columns, in exchange where these are taken, until no such step improves. Looks
  // at all rows, or at those whose worth has changed since they were last looked at.
  void exchange(const Problem& p);
  void exchange_stale(const Problem& p);
  bool try_exchange(const Problem& p, std::int64_t i, std::int32_t column);
  void add(const Problem& p, std::int64_t i, std::int64_t j);
  void remove(const Problem& p, std::int64_t i, std::int64_t j);
  void mark_stale(const Problem& p, std::int64_t i);
  void begin(const Problem& p, const std::int32_t* column_of);
  std::int64_t between(const Problem& p, std::int64_t i, std::int64_t j, std::int64_t k,
                       std::int64_t l) const;

  // [n * n] and [m * m]: in which lists of the first node the second is; worth of a set of lists
  std::vector<std::uint8_t> lists_a_, lists_b_;
  std::int64_t worth_of_lists_[1 << kLists] = {};
  std::vector<std::uint8_t> stale_;  // [n]
  std::vector<std::int32_t> queue_;  // the stale rows
  Partial now_;
  Assignment lap_;
  std::vector<std::int32_t> price_, next_, kept_;
};

}  // namespace compact
