#include "parse.h"

#include <algorithm>
#include <array>
#include <limits>

#include "lexicon.h"
#include "lines.h"
#include "numbers.h"
#include "text.h"

namespace compact {

namespace {

constexpr std::uint64_t kIs = hash_of("is"), kAre = hash_of("are"), kBe = hash_of("be"),
                        kX = hash_of("x");

enum CharClass : std::uint8_t { kMark, kSpace, kDigit, kLetter, kStopMark };

struct CharTables {
  CharClass of[256] = {};
  std::uint8_t in_word[256] = {};  // lower case, 0 for what ends a word
  constexpr CharTables() {
    for (int c = 0; c < 256; ++c) {
      const auto b = static_cast<unsigned char>(c);
      if (is_digit(b))
        of[c] = kDigit;
      else if (is_letter(b))
        of[c] = kLetter;
      else if (c == ' ' || c == '\t' || c == '\r' || c == '\f' || c == '\v' || c == 0)
        of[c] = kSpace;
      else if (c == '.' || c == '!' || c == '?' || c == ';' || c == '\n')
        of[c] = kStopMark;
      if (is_digit(b) || is_letter(b))
        in_word[c] = b >= 'A' && b <= 'Z' ? static_cast<std::uint8_t>(b + 32) : b;
    }
  }
};
constexpr CharTables kChars;

bool is_ascii_letter(char c) {
  return static_cast<unsigned char>(c) < 0x80 && is_letter(static_cast<unsigned char>(c));
}

std::uint8_t operator_bit(char c) {
  switch (c) {
    case '+': return 1;
    case '-': return 2;
    case '*': return 4;
    default: return 8;
  }
}

// Does "-" or "-$" stand right before `at`?
bool signed_at(std::string_view t, std::size_t at) {
  if (at > 1 && t[at - 1] == '$') --at;
  return at > 0 && t[at - 1] == '-';
}

// May a sentence end before `c`?
bool may_follow_stop(char c) {
  return is_gap(c) || c == '\r' || c == '\f' || c == '\v' || c == '\n' || c == '"' || c == '\'' ||
         c == ')' || c == '*' || c == ']';
}

}  // namespace

void Parser::begin_answer(std::size_t behind) {
  at_ = behind;
  if (answer_.active)
    steps_.drop();
  else
    steps_.begin_answer();
  answer_.begin();
  asked_ = false;
  before_ = kStart;
}

void Parser::settle(Answer& answer) {
  if (answer.key(answer_key_)) answer_kind_ = kExplicitAnswer;
  answer.active = false;
}

// The number that starts at `from`, after its sign.
void Parser::take_number(std::int64_t key, std::size_t from) {
  if (negative_ && signed_at(t_, from)) key = -key;
  if (Answer* answer = target()) answer->number(key);
  if (!answer_.active) steps_.number(key, before_ == kEqual);
  before_ = kNumber;
}

void Parser::take_equals() {
  if (Answer* answer = target()) answer->equals();
  if (!answer_.active) steps_.equals();
  before_ = kEqual;
}

void Parser::read_number(std::size_t end) {
  const std::size_t from = at_;
  const std::string_view spelling = t_.substr(from, end - from);
  at_ = end;
  asked_ = false;
  surface_.add(fnv(spelling));
  take_number(number_key(spelling), from);
}

void Parser::read_word() {
  const std::size_t from = at_;
  std::uint64_t hash = kFnvStart, before_last = kFnvStart;
  std::size_t length = 0;
  unsigned char last = 0, second_last = 0;
  Answer* const answer = target();
  if (answer) lower_.clear();
  for (; at_ < t_.size(); ++at_) {
    const std::uint8_t b = kChars.in_word[static_cast<unsigned char>(t_[at_])];
    if (b == 0) {
      if (t_[at_] == '\'') continue;
      break;
    }
    before_last = hash;
    hash = fnv_step(hash, b);
    second_last = last;
    last = b;
    ++length;
    if (answer) lower_.push_back(static_cast<char>(b));
  }
  if (asked_ && (hash == kIs || hash == kAre || hash == kBe)) return begin_answer(at_);
  const WordInfo info = find_word(hash);
  asked_ = info.kind == kAnswerWord;
  surface_.add(hash);
  const std::uint8_t op = info.kind == kOperatorWord           ? info.value
                          : hash == kX && before_ == kNumber ? std::uint8_t{4}
                                                             : std::uint8_t{0};
  if (info.kind == kNumberWord && !answer_.active) {
    take_number(info.value * kMicro, from);
  } else if (op != 0) {
    if (answer) answer->divide(false);
    if (!answer_.active) steps_.operation(op, true);
    before_ = kOperator;
  } else if (info.kind == kEquals) {
    take_equals();
  } else {
    if (answer) answer->word(lower_);
    steps_.see_word();
    if (!answer_.active && info.kind != kStop) {
      const bool plural = length > 3 && last == 's' && second_last != 's';
      steps_.word(mix(plural ? before_last : hash));
    }
    before_ = kWord;
    short_word_ = length == 1 || info.abbreviation;
  }
}

// At "." "!" "?" ";" or a line end that ends a sentence.
void Parser::end_sentence(bool line) {
  const std::size_t here = at_++;
  if (t_[here] == '.' && before_ == kWord && short_word_ && !is_gap(t_[here - 1])) return;
  if (answer_.active) {
    settle(answer_);
    steps_.drop();
  } else {
    steps_.end_step();
  }
  before_ = kStart;
  asked_ = false;
  start_of_line_ = line;
}

// A LaTeX command at "\": the operator that it means, or 0.
char Parser::read_command() {
  std::size_t end = at_ + 1;
  while (end < t_.size() && is_ascii_letter(t_[end])) ++end;
  const std::string_view command = t_.substr(at_ + 1, end - at_ - 1);
  at_ = end;
  if (command == "times" || command == "cdot") return '*';
  if (command == "div") return '/';
  if (command == "boxed") {
    boxed_.begin();
    depth_ = 0;
  }
  return 0;
}

// Everything that is neither number, word, space nor the end of a sentence.
void Parser::read_mark() {
  const char c = t_[at_];
  char op = 0;
  switch (c) {
    case '<': {
      std::size_t end = 0;
      if (peek(1) == '<' && is_note(t_, at_, end))
        at_ = before_ == kEqual ? end : at_ + 2;
      else
        ++at_;
      return;
    }
    case '#':
      if (t_.compare(at_, 4, "####") == 0) return begin_answer(at_ + 4);
      ++at_;
      return;
    case '\\':
      if (!is_ascii_letter(peek(1))) {
        ++at_;
        return;
      }
      op = read_command();
      break;
    case '=':
      if (asked_) return begin_answer(at_ + 1);
      ++at_;
      return take_equals();
    case '*':
      if (peek(1) == '*') {  // bold
        while (at_ < t_.size() && t_[at_] == '*') ++at_;
        return;
      }
      [[fallthrough]];
    case '-':
    case '+':
    case '/':
      ++at_;
      op = c;
      break;
    case '{':
      ++at_;
      ++depth_;
      return;
    case '}':
      ++at_;
      --depth_;
      if (boxed_.active && depth_ <= 0)
        settle(boxed_);
      else if (peek(0) == '{')
        op = '/';  // \frac{a}{b}
      break;
    case ')':
    case ']':
      ++at_;
      before_ = kClose;
      return;
    case ':':
      if (asked_) return begin_answer(at_ + 1);
      [[fallthrough]];
    case ',':
      ++at_;
      before_ = kStart;
      steps_.see_comma();
      return;
    default:
      ++at_;
      return;
  }
  if (op == 0) return;
  if (op == '-') {
    negative_ = before_ == kStart || before_ == kOperator || before_ == kEqual;
    if (negative_) return;  // a sign
  }
  if (Answer* answer = target()) answer->divide(op == '/');
  if (!answer_.active) steps_.operation(operator_bit(op), op != '-' || before_ == kNumber);
  before_ = kOperator;
}

bool Parser::run(std::string_view text, StepGraphs& out) {
  t_ = normalise(text, text_);
  at_ = 0;
  before_ = kStart;
  start_of_line_ = true;
  asked_ = negative_ = short_word_ = false;
  depth_ = 0;
  answer_.active = boxed_.active = false;
  answer_kind_ = kNoAnswer;
  answer_key_ = 0;
  steps_.start(out, max_steps_);
  surface_.start();

  while (at_ < t_.size() && !steps_.too_long()) {
    if (start_of_line_) {
      start_of_line_ = false;
      at_ = skip_line_start(t_, at_);
      continue;
    }
    const char c = t_[at_];
    switch (kChars.of[static_cast<unsigned char>(c)]) {
      case kSpace:
        ++at_;
        break;
      case kLetter:
        read_word();
        break;
      case kDigit:
        read_number(scan_number(t_, at_));
        break;
      case kStopMark: {
        if (const std::size_t end = scan_number(t_, at_); end != at_)
          read_number(end);  // ".5"
        else if (c == '\n' || at_ + 1 == t_.size() || may_follow_stop(t_[at_ + 1]))
          end_sentence(c == '\n');
        else
          ++at_;
        break;
      }
      case kMark:
        read_mark();
        break;
    }
  }
  if (boxed_.active) settle(boxed_);
  if (answer_.active)
    settle(answer_);
  else
    steps_.end_step();
  return !steps_.too_long();
}

// The last result, or the last computed one if the last step speaks of it.
void Parser::imply_answer(const StepGraphs& g) {
  const auto first_node = static_cast<std::int64_t>(steps_.first_node());
  std::int64_t last = -1, stated = -1;
  for (auto i = first_node; i < static_cast<std::int64_t>(g.nodes()); ++i) {
    if (g.result_kind[i] != kNoResult) last = i;
    if (g.result_kind[i] == kStatedResult) stated = i;
  }
  if (last < 0) return;
  answer_kind_ = kImpliedAnswer;
  answer_key_ = g.result[last];
  if (stated < 0) return;
  const std::size_t end = g.nodes() - 1;
  const std::int64_t key = g.result[stated];
  const auto first = g.numbers.begin() + g.cu_numbers[end];
  const bool mentioned = (g.result_kind[end] != kNoResult && g.result[end] == key) ||
                         std::find(first, g.numbers.end(), key) != g.numbers.end();
  if (mentioned) answer_key_ = key;
}

bool Parser::parse(std::string_view text, StepGraphs& g) {
  const std::size_t nodes = g.nodes(), numbers = g.numbers.size(), edges = g.edge_source.size();
  if (!run(text, g)) {
    g.result.resize(nodes);
    g.result_kind.resize(nodes);
    g.operators.resize(nodes);
    g.signature.resize(nodes);
    g.cu_numbers.resize(nodes + 1);
    g.numbers.resize(numbers);
    g.edge_source.resize(edges);
    g.edge_target.resize(edges);
    g.edge_type.resize(edges);
    return false;
  }
  if (answer_kind_ == kNoAnswer) imply_answer(g);
  g.answer.push_back(answer_key_);
  g.answer_kind.push_back(answer_kind_);
  surface_.finish(g.shingles);
  g.cu_nodes.push_back(static_cast<std::int64_t>(g.nodes()));
  g.cu_edges.push_back(static_cast<std::int64_t>(g.edge_source.size()));
  g.cu_shingles.push_back(static_cast<std::int64_t>(g.shingles.size()));
  return true;
}

bool Parser::answer_key(std::string_view text, std::int64_t& key) {
  // line ends inside a given answer separate nothing
  marked_ = "#### ";
  for (char c : text) marked_.push_back(c == '\n' ? ' ' : c);
  scratch_.clear();
  const std::int64_t limit = max_steps_;
  max_steps_ = std::numeric_limits<std::int64_t>::max();  // of rationales, not of answers
  run(marked_, scratch_);
  max_steps_ = limit;
  if (answer_kind_ != kExplicitAnswer) return false;
  key = answer_key_;
  return true;
}

}  // namespace compact
