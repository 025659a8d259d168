#include "graph.h"

#include "parallel.h"

namespace compact {

void StepGraphs::clear() {
  each_column([&](const char*, auto member, bool offsets) {
    if (offsets)
      (this->*member).assign(1, {});
    else
      (this->*member).clear();
  });
}

void Join::run(int threads) {
  const auto count = static_cast<std::int64_t>(parts_.size());
  parallel_for(count, 4, threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (auto p = static_cast<std::size_t>(begin); p < static_cast<std::size_t>(end); ++p) {
      for (const auto& copy : columns_) copy(parts_[p], p);
      parts_[p] = StepGraphs{};
    }
  });
}

}  // namespace compact
