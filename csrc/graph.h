// Step graphs of many rationales as flat arrays (CSR): the one data structure all parts share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace compact {

enum ResultKind : std::uint8_t { kNoResult = 0, kImpliedResult = 1, kStatedResult = 2 };
enum AnswerKind : std::uint8_t { kNoAnswer = 0, kImpliedAnswer = 1, kExplicitAnswer = 2 };
enum EdgeType : std::uint8_t { kNext = 0, kUses = 1 };
constexpr int kEdgeTypes = 2;

using Signature = std::array<std::uint64_t, 8>;  // 512-bit set of hashed words and word pairs

struct StepGraphs {
  // per graph (offsets have one more entry than there are graphs)
  std::vector<std::int64_t> cu_nodes{0};
  std::vector<std::int64_t> cu_edges{0};
  std::vector<std::int64_t> cu_shingles{0};
  std::vector<std::int64_t> answer;
  std::vector<std::uint8_t> answer_kind;
  // per node
  std::vector<std::int64_t> result;
  std::vector<std::uint8_t> result_kind;
  std::vector<std::uint8_t> operators;  // bit set: 1 +, 2 -, 4 *, 8 /
  std::vector<Signature> signature;
  std::vector<std::int64_t> cu_numbers{0};
  std::vector<std::int64_t> numbers;  // sorted and distinct inside a node
  // per edge; node numbers count from the graph's first node
  std::vector<std::int32_t> edge_source;
  std::vector<std::int32_t> edge_target;
  std::vector<std::uint8_t> edge_type;
  // surface: hashes of 3 consecutive words, sorted and distinct inside a graph
  std::vector<std::uint64_t> shingles;

  std::size_t size() const { return answer.size(); }
  std::size_t nodes() const { return result.size(); }
  void clear();  // keeps the memory
  void append(const StepGraphs& other);
  // Room for the graphs of all `parts`.
  void reserve(const std::vector<StepGraphs>& parts);
};

}  // namespace compact
