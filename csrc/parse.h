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

#include "answer.h"
#include "graph.h"
#include "steps.h"
#include "surface.h"

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
  enum Before : std::uint8_t { kStart, kNumber, kWord, kOperator, kEqual, kClose };

  bool run(std::string_view text, StepGraphs& out);
  void read_number(std::size_t end);
  void read_word();
  void read_mark();
  char read_command();
  void end_sentence(bool line);
  void begin_answer(std::size_t behind);
  void settle(Answer& answer);
  void take_number(std::int64_t key, std::size_t from);
  void take_equals();
  void imply_answer(const StepGraphs& g);

  // The answer that tokens belong to as well, if one is being read.
  Answer* target() { return answer_.active ? &answer_ : boxed_.active ? &boxed_ : nullptr; }
  char peek(std::size_t ahead) const { return at_ + ahead < t_.size() ? t_[at_ + ahead] : '\0'; }

  std::int64_t max_steps_ = 512;
  std::string text_, lower_;  // normalised text; the word being read, in lower case
  std::string marked_;        // answer_key(): the answer with a mark in front
  StepGraphs scratch_;
  std::string_view t_;
  std::size_t at_ = 0;
  Before before_ = kStart;
  bool start_of_line_ = true;
  bool asked_ = false;       // "answer" was the word before
  bool negative_ = false;    // the last "-" was a sign
  bool short_word_ = false;  // the word before may end in "." without ending the sentence
  int depth_ = 0;            // of braces inside \boxed{}

  StepBuilder steps_;
  Surface surface_;
  Answer answer_, boxed_;
  std::int64_t answer_key_ = 0;
  AnswerKind answer_kind_ = kNoAnswer;
};

}  // namespace compact
