// Text -> step graph, in one pass.
//
// Steps end at line ends, at . ! ? ; before white space, and where a second equation starts in the
// same sentence. List marks, "Step 3:", markdown and LaTeX dress are skipped. A step's result is the
// number behind its last "=" ("stated"), else its last number if it has no operator ("implied"); its
// other numbers are its operands. A chain "a = b = c" is one step. Step i "uses" the latest earlier
// step whose result is one of i's operands. The final answer is what follows "####", "answer is",
// "answer:" or stands in \boxed{}, the last of them; without any, the last result, or
// the last stated one where the last step mentions it. Number words from
// two to ninety count as numbers. Nothing is evaluated; time is linear in the text.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "answer.h"
#include "graph.h"

namespace compact {

class Parser {
 public:
  void set_limit(std::int64_t max_steps) { max_steps_ = max_steps; }

  // Appends the graph of `text` to `graphs`. Returns false, and leaves `graphs` as it was, if the
  // text has more than max_steps steps.
  bool parse(std::string_view text, StepGraphs& graphs);

  // Canonical key of a final answer given by itself; false if it says nothing.
  bool answer_key(std::string_view text, std::int64_t& key);

 private:
  struct Step {
    std::vector<std::int64_t> numbers;
    std::vector<std::uint64_t> words;
    std::uint8_t operators = 0;
    bool comma = false, word = false;  // seen at all
    // Does this, found between two "=", begin a new equation rather than continue a chain?
    bool begins_equation() const {
      return (!numbers.empty() && (word || comma)) || (word && comma);
    }
    void clear() { numbers.clear(), words.clear(), operators = 0, comma = word = false; }
    void take(Step& other);
  };
  void reset_step();
  void merge();
  void retract();
  void flush();
  void begin_answer();
  void settle(Answer& answer);
  void add_number(std::int64_t key, bool after_equals);
  void add_word(std::uint64_t hash);
  void add_shingle(std::uint64_t hash);
  void imply_answer();
  bool run(std::string_view text);

  std::int64_t max_steps_ = 512;
  StepGraphs* out_ = nullptr;
  std::size_t first_node_ = 0;
  bool too_long_ = false;
  std::string text_, lower_;
  // the step being read; `tail_` is what followed its finished equation
  Step step_, tail_;
  bool has_tail_ = false, has_equation_ = false;
  std::int64_t equation_ = 0;
  std::uint64_t last_word_ = 0;
  Answer answer_, boxed_;
  std::int64_t answer_key_ = 0;
  AnswerKind answer_kind_ = kNoAnswer;
  std::unordered_map<std::int64_t, std::int32_t> last_result_;
  std::vector<std::int32_t> sources_;
  std::uint64_t window_[3] = {0, 0, 0};
  int window_size_ = 0;
  std::vector<std::uint64_t> shingles_, sorted_;
};

}  // namespace compact
