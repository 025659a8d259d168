#include "graph.h"

namespace compact {

void StepGraphs::clear() { *this = StepGraphs{}; }

void StepGraphs::append(const StepGraphs& other) {
  auto offsets = [](std::vector<std::int64_t>& to, const std::vector<std::int64_t>& from) {
    std::int64_t base = to.back();
    for (std::size_t i = 1; i < from.size(); ++i) to.push_back(base + from[i]);
  };
  auto values = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  offsets(cu_nodes, other.cu_nodes);
  offsets(cu_edges, other.cu_edges);
  offsets(cu_shingles, other.cu_shingles);
  offsets(cu_numbers, other.cu_numbers);
  values(answer, other.answer);
  values(answer_kind, other.answer_kind);
  values(result, other.result);
  values(result_kind, other.result_kind);
  values(operators, other.operators);
  values(signature, other.signature);
  values(numbers, other.numbers);
  values(edge_source, other.edge_source);
  values(edge_target, other.edge_target);
  values(edge_type, other.edge_type);
  values(shingles, other.shingles);
}

}  // namespace compact
