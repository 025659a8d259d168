// From tokens to steps: numbers, words and operators gather until a step ends; then it becomes a node,
// with edges from the step before and from the steps whose results it uses.
#pragma once

#include <cstdint>
#include <vector>

#include "graph.h"

namespace compact {

// The latest step that has a number as its result.
class ResultTable {
 public:
  void clear();
  std::int32_t find(std::int64_t key) const;  // -1: none
  void set(std::int64_t key, std::int32_t step);

 private:
  struct Slot {
    std::int64_t key;
    std::int32_t step;
    std::uint32_t epoch;  // another than epoch_: empty
  };
  std::size_t place(std::int64_t key) const;
  void grow();
  std::vector<Slot> slots_ = std::vector<Slot>(64, Slot{0, 0, 0});
  std::uint32_t epoch_ = 1;
  std::size_t used_ = 0;
};

class StepBuilder {
 public:
  // Steps go to the end of `out` as one graph.
  void start(StepGraphs& out, std::int64_t max_steps);

  void number(std::int64_t key, bool after_equals);
  void word(std::uint64_t hash);  // one that is kept
  void see_word() { tail_.word = true; }
  void see_comma() { tail_.comma = true; }
  // `binds`: after a finished equation this operator makes its result the start of an expression.
  void operation(std::uint8_t bit, bool binds);
  // "=": ends the step where a second equation starts behind the first.
  void equals();
  void end_step();
  // Ends the step if its equation is finished; drops what else has been read of it, as drop() does.
  void begin_answer();
  void drop() { reset(); }

  bool too_long() const { return too_long_; }
  std::size_t first_node() const { return first_node_; }

 private:
  struct Step {
    std::vector<std::int64_t> numbers;
    Signature words{};
    bool has_words = false;
    std::uint8_t operators = 0;
    bool comma = false, word = false;  // seen at all
    // Does this, found between two "=", begin a new equation rather than continue a chain?
    bool begins_equation() const {
      return (!numbers.empty() && (word || comma)) || (word && comma);
    }
    void clear();
    void take(Step& other);
    void mark(std::uint64_t hash) {
      words[hash >> 61] |= std::uint64_t{1} << ((hash >> 55) & 63);
    }
  };
  void reset();
  void merge();
  void retract();
  void flush();
  void edges(std::int32_t me, const std::vector<std::int64_t>& operands);

  StepGraphs* out_ = nullptr;
  std::size_t first_node_ = 0;
  std::int64_t max_steps_ = 0;
  bool too_long_ = false;
  // the step being read; `tail_` is what followed its finished equation
  Step step_, tail_;
  bool has_tail_ = false, has_equation_ = false;
  std::int64_t equation_ = 0;
  std::uint64_t last_word_ = 0;
  ResultTable results_;
  std::vector<std::int32_t> sources_;
};

}  // namespace compact
