// Step graphs of many rationales as flat arrays (CSR): the one data structure all parts share.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
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
};

// Calls f(name, pointer to member, is it offsets) for every column.
template <class F>
void each_column(F&& f) {
  f("cu_nodes", &StepGraphs::cu_nodes, true);
  f("cu_edges", &StepGraphs::cu_edges, true);
  f("cu_shingles", &StepGraphs::cu_shingles, true);
  f("answer", &StepGraphs::answer, false);
  f("answer_kind", &StepGraphs::answer_kind, false);
  f("result", &StepGraphs::result, false);
  f("result_kind", &StepGraphs::result_kind, false);
  f("operators", &StepGraphs::operators, false);
  f("signature", &StepGraphs::signature, false);
  f("cu_numbers", &StepGraphs::cu_numbers, true);
  f("numbers", &StepGraphs::numbers, false);
  f("edge_source", &StepGraphs::edge_source, false);
  f("edge_target", &StepGraphs::edge_target, false);
  f("edge_type", &StepGraphs::edge_type, false);
  f("shingles", &StepGraphs::shingles, false);
}

// Puts the graphs of several parts one behind the other, in memory that the caller gives. All threads
// copy: by one alone this would take a fifth of the time in which two parse.
class Join {
 public:
  // room(name, count, T()) returns memory for `count` values of type T. `parts` must outlive this.
  template <class Room>
  Join(std::vector<StepGraphs>& parts, Room&& room) : parts_(parts) {
    each_column([&](const char* name, auto member, bool offsets) {
      const std::size_t skip = offsets ? 1 : 0;  // the 0 that offsets begin with
      std::vector<std::size_t> start;
      std::size_t count = skip;
      for (const StepGraphs& part : parts) {
        start.push_back(count);
        count += (part.*member).size() - skip;
      }
      using Value = typename std::decay_t<decltype(parts.front().*member)>::value_type;
      Value* to = room(name, count, Value());
      if constexpr (std::is_same_v<Value, std::int64_t>) {
        if (offsets) {
          std::vector<std::int64_t> base{0};
          for (const StepGraphs& part : parts) base.push_back(base.back() + (part.*member).back());
          to[0] = 0;
          columns_.push_back([=](const StepGraphs& part, std::size_t p) {
            const auto& from = part.*member;
            for (std::size_t i = 1; i < from.size(); ++i) to[start[p] + i - 1] = base[p] + from[i];
          });
          return;
        }
      }
      columns_.push_back([=](const StepGraphs& part, std::size_t p) {
        std::copy((part.*member).begin(), (part.*member).end(), to + start[p]);
      });
    });
  }

  void run(int threads);  // empties the parts

 private:
  std::vector<StepGraphs>& parts_;
  std::vector<std::function<void(const StepGraphs& part, std::size_t index)>> columns_;
};

}  // namespace compact
