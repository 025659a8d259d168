// The surface of a text: hashes of three consecutive words, by which near-copies are found.
#pragma once

#include <cstdint>
#include <vector>

#include "text.h"

namespace compact {

class Surface {
 public:
  void start() {
    hashes_.clear();
    words_ = 0;
  }
  void add(std::uint64_t word) {
    const std::uint64_t third = mix(word);
    if (++words_ >= 3) hashes_.push_back(pair_hash(pair_hash(first_, second_), third));
    first_ = second_;
    second_ = third;
  }
  // Appends the distinct hashes, in order.
  void finish(std::vector<std::uint64_t>& out);

 private:
  std::uint64_t first_ = 0, second_ = 0;
  std::int64_t words_ = 0;
  std::vector<std::uint64_t> hashes_, sorted_;
};

}  // namespace compact
