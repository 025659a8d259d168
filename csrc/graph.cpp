#include "graph.h"

namespace compact {

void StepGraphs::clear() {
  for (auto* offsets : {&cu_nodes, &cu_edges, &cu_shingles, &cu_numbers}) offsets->assign(1, 0);
  for (auto* values : {&answer, &result, &numbers}) values->clear();
  for (auto* values : {&answer_kind, &result_kind, &operators, &edge_type}) values->clear();
  for (auto* values : {&edge_source, &edge_target}) values->clear();
  signature.clear();
  shingles.clear();
}

void StepGraphs::reserve(const std::vector<StepGraphs>& parts) {
  auto room = [&](auto member) {
    std::size_t sum = 1;  // offsets have one more
    for (const StepGraphs& part : parts) sum += (part.*member).size();
    (this->*member).reserve(sum);
  };
  room(&StepGraphs::cu_nodes);
  room(&StepGraphs::cu_edges);
  room(&StepGraphs::cu_shingles);
  room(&StepGraphs::answer);
  room(&StepGraphs::answer_kind);
  room(&StepGraphs::result);
  room(&StepGraphs::result_kind);
  room(&StepGraphs::operators);
  room(&StepGraphs::signature);
  room(&StepGraphs::cu_numbers);
  room(&StepGraphs::numbers);
  room(&StepGraphs::edge_source);
  room(&StepGraphs::edge_target);
  room(&StepGraphs::edge_type);
  room(&StepGraphs::shingles);
}

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
