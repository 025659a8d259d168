#include "parse.h"

#include <algorithm>

#include "lexicon.h"
#include "numbers.h"
#include "text.h"

namespace compact {

namespace {

constexpr std::uint64_t kIs = hash_of("is"), kAre = hash_of("are"), kBe = hash_of("be"),
                        kX = hash_of("x");

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\f' || c == '\v'; }
bool is_gap(char c) { return c == ' ' || c == '\t'; }

std::uint8_t operator_bit(char c) {
  switch (c) {
    case '+': return 1;
    case '-': return 2;
    case '*': return 4;
    default: return 8;
  }
}

// Past indentation, bullets, quote and heading marks at the start of a line, and past "3.", "(a)" or
// "Step 3:" behind them.
std::size_t skip_line_start(std::string_view t, std::size_t at) {
  auto get = [&](std::size_t i) { return i < t.size() ? t[i] : '\0'; };
  auto has = [&](std::size_t i) { return i < t.size(); };
  while (has(at)) {
    char c = t[at];
    if (c == ' ' || c == '\t' || c == '*' || c == '>' || c == '_') {
      ++at;
    } else if (c == '#' && t.substr(at + 1, 3) != "###") {
      ++at;
    } else if (c == '-' && has(at + 1) && is_gap(t[at + 1])) {
      ++at;
    } else {
      break;
    }
  }
  std::size_t p = at;
  if ((get(p) == 'S' || get(p) == 's') && t.substr(p + 1, 3) == "tep" && is_gap(get(p + 4))) {
    p += 4;
    while (has(p) && is_gap(t[p])) ++p;
    std::size_t digits = p;
    while (has(p) && p - digits < 4 && is_digit(static_cast<unsigned char>(t[p]))) ++p;
    if (p > digits) {
      at = p;
      while (has(p) && is_gap(t[p])) ++p;
      at = p;
      char c = get(p);
      if (c == ':' || c == '.' || c == ')' || c == '-') at = p + 1;
      return at;
    }
  }
  p = at;
  if (get(p) == '(') ++p;
  std::size_t digits = p;
  while (has(p) && is_digit(static_cast<unsigned char>(t[p]))) ++p;
  if (p > digits && p - digits <= 3 && (get(p) == '.' || get(p) == ')') && has(p + 1) &&
      is_gap(t[p + 1]))
    return p + 1;
  char letter = get(at + 1);
  if (get(at) == '(' && static_cast<unsigned char>(letter) < 0x80 &&
      is_letter(static_cast<unsigned char>(letter)) && get(at + 2) == ')' && has(at + 3) &&
      is_gap(t[at + 3]))
    return at + 3;
  return at;
}

// Hashes are spread evenly: deal them out by their top byte, then straighten what is nearly sorted.
void sort_hashes(const std::vector<std::uint64_t>& hashes, std::vector<std::uint64_t>& out) {
  out.resize(hashes.size());
  if (hashes.size() > 4096) {
    out = hashes;
    std::sort(out.begin(), out.end());
    return;
  }
  std::uint16_t place[257] = {};
  for (std::uint64_t h : hashes) ++place[(h >> 56) + 1];
  for (int b = 0; b < 256; ++b) place[b + 1] = static_cast<std::uint16_t>(place[b + 1] + place[b]);
  for (std::uint64_t h : hashes) out[place[h >> 56]++] = h;
  for (std::size_t i = 1; i < out.size(); ++i) {
    const std::uint64_t h = out[i];
    std::size_t j = i;
    for (; j > 0 && out[j - 1] > h; --j) out[j] = out[j - 1];
    out[j] = h;
  }
}

// Does "-" or "-$" stand right before `at`?
bool signed_at(std::string_view t, std::size_t at) {
  if (at > 1 && t[at - 1] == '$') --at;
  return at > 0 && t[at - 1] == '-';
}

// Does "<<" at `at` open a calculator note, "<<" [^<>\n]{0,200} ">>"?
bool is_note(std::string_view t, std::size_t at, std::size_t& end) {
  std::size_t p = at + 2, limit = std::min(t.size(), at + 203);
  while (p < limit && t[p] != '<' && t[p] != '>' && t[p] != '\n') ++p;
  if (p + 1 < t.size() && p - (at + 2) <= 200 && t[p] == '>' && t[p + 1] == '>') {
    end = p + 2;
    return true;
  }
  return false;
}

}  // namespace

void Parser::Step::take(Step& other) {
  numbers.insert(numbers.end(), other.numbers.begin(), other.numbers.end());
  words.insert(words.end(), other.words.begin(), other.words.end());
  operators |= other.operators;
  other.clear();
}

void Parser::reset_step() {
  step_.clear();
  tail_.clear();
  has_tail_ = has_equation_ = false;
  last_word_ = 0;
}

void Parser::merge() {
  if (has_tail_) step_.take(tail_);
  has_tail_ = false;
}

// What looked like a result was the start of an expression, or a link of a chain.
void Parser::retract() {
  if (has_equation_) step_.numbers.push_back(equation_);
  has_equation_ = false;
  merge();
}

void Parser::flush() {
  merge();
  if (step_.numbers.empty() && step_.words.empty() && !has_equation_) return;
  StepGraphs& g = *out_;
  auto me = static_cast<std::int32_t>(g.nodes() - first_node_);
  if (me >= max_steps_) {
    too_long_ = true;
    return;
  }
  ResultKind kind = kNoResult;
  std::int64_t result = 0;
  if (has_equation_) {
    kind = kStatedResult;
    result = equation_;
  } else if (!step_.numbers.empty() && step_.operators == 0) {
    kind = kImpliedResult;
    result = step_.numbers.back();
  }
  auto& n = step_.numbers;
  std::sort(n.begin(), n.end());
  n.erase(std::unique(n.begin(), n.end()), n.end());
  if (kind == kImpliedResult) n.erase(std::find(n.begin(), n.end(), result));
  Signature signature{};
  for (std::uint64_t hash : step_.words) signature[hash >> 61] |= 1ull << ((hash >> 55) & 63);
  g.result.push_back(result);
  g.result_kind.push_back(kind);
  g.operators.push_back(step_.operators);
  g.signature.push_back(signature);
  g.numbers.insert(g.numbers.end(), n.begin(), n.end());
  g.cu_numbers.push_back(static_cast<std::int64_t>(g.numbers.size()));
  auto edge = [&](std::int32_t source, EdgeType type) {
    g.edge_source.push_back(source);
    g.edge_target.push_back(me);
    g.edge_type.push_back(type);
  };
  if (me > 0) edge(me - 1, kNext);
  sources_.clear();
  for (std::int64_t key : n) {
    auto found = last_result_.find(key);
    if (found != last_result_.end()) sources_.push_back(found->second);
  }
  std::sort(sources_.begin(), sources_.end());
  sources_.erase(std::unique(sources_.begin(), sources_.end()), sources_.end());
  for (std::int32_t source : sources_) edge(source, kUses);
  if (kind != kNoResult) last_result_[result] = me;
}

void Parser::begin_answer() {
  if (!answer_.active && (has_equation_ || has_tail_)) flush();
  answer_.begin();
  reset_step();
}

void Parser::settle(Answer& answer) {
  if (answer.key(answer_key_)) answer_kind_ = kExplicitAnswer;
  answer.active = false;
}

void Parser::add_number(std::int64_t key, bool after_equals) {
  if (after_equals) {
    retract();
    equation_ = key;
    has_equation_ = has_tail_ = true;
    tail_.clear();
  } else {
    (has_tail_ ? tail_ : step_).numbers.push_back(key);
  }
}

void Parser::add_word(std::uint64_t hash) {
  auto& words = (has_tail_ ? tail_ : step_).words;
  words.push_back(hash);
  if (last_word_ != 0) words.push_back(pair_hash(last_word_, hash));
  last_word_ = hash;
}

void Parser::add_shingle(std::uint64_t hash) {
  window_[0] = window_[1];
  window_[1] = window_[2];
  window_[2] = mix(hash);
  if (++window_size_ >= 3)
    shingles_.push_back(pair_hash(pair_hash(window_[0], window_[1]), window_[2]));
}

bool Parser::run(std::string_view text) {
  normalise(text, text_);
  const std::string_view t = text_;
  enum Before { kStart, kNumber, kWord, kOperator, kEqual, kClose } before = kStart;
  bool start_of_line = true, asked = false, negative = false;
  bool short_word = false;  // the word before may end in "." without ending the sentence
  int depth = 0;
  std::size_t at = 0;
  reset_step();
  answer_.active = boxed_.active = false;
  answer_kind_ = kNoAnswer;
  answer_key_ = 0;
  last_result_.clear();
  shingles_.clear();
  window_size_ = 0;
  too_long_ = false;

  while (at < t.size() && !too_long_) {
    if (start_of_line) {
      start_of_line = false;
      at = skip_line_start(t, at);
      if (at >= t.size()) break;
    }
    const std::size_t here = at;
    const char c = t[at];
    const auto uc = static_cast<unsigned char>(c);
    Answer* target = answer_.active ? &answer_ : boxed_.active ? &boxed_ : nullptr;

    if (is_space(c) || c == '\0') {
      ++at;
      continue;
    }
    // ---- numbers
    if (std::size_t end = scan_number(t, at); end != at) {
      std::string_view spelling = t.substr(at, end - at);
      at = end;
      asked = false;
      add_shingle(fnv(spelling));
      std::int64_t key = number_key(spelling);
      if (negative && signed_at(t, here)) key = -key;
      if (target) target->number(key);
      if (!answer_.active) add_number(key, before == kEqual);
      before = kNumber;
      continue;
    }
    // ---- words
    if (is_letter(uc)) {
      std::uint64_t hash = kFnvStart, before_last = kFnvStart;
      std::size_t length = 0;
      char last = 0, second_last = 0;
      const bool keep = target != nullptr;
      lower_.clear();
      for (; at < t.size(); ++at) {
        auto b = static_cast<unsigned char>(t[at]);
        if (b == '\'') continue;
        if (b >= 'A' && b <= 'Z') b = static_cast<unsigned char>(b + 32);
        if (!is_letter(b) && !is_digit(b)) break;
        before_last = hash;
        hash = fnv_step(hash, b);
        second_last = last;
        last = static_cast<char>(b);
        ++length;
        if (keep) lower_.push_back(last);
      }
      const WordInfo& info = find_word(hash);
      if (asked && (hash == kIs || hash == kAre || hash == kBe)) {
        begin_answer();
        asked = false;
        before = kStart;
        continue;
      }
      asked = info.kind == kAnswerWord;
      add_shingle(hash);
      std::uint8_t op = 0;
      if (hash == kX && before == kNumber) op = 4;
      if (info.kind == kOperatorWord) op = info.value;
      if (info.kind == kNumberWord && !answer_.active) {
        std::int64_t key = info.value * kMicro;
        if (negative && signed_at(t, here)) key = -key;
        if (target) target->number(key);
        add_number(key, before == kEqual);
        before = kNumber;
      } else if (op != 0) {
        if (target) target->divide(false);
        if (!answer_.active) {
          if (has_tail_ && tail_.numbers.empty()) retract();
          (has_tail_ ? tail_ : step_).operators |= op;
        }
        before = kOperator;
      } else if (info.kind == kEquals) {
        if (target) target->equals();
        if (!answer_.active && has_tail_ && tail_.begins_equation()) {
          Step rest;
          std::swap(rest, tail_);
          has_tail_ = false;
          flush();
          reset_step();
          std::swap(step_, rest);
        }
        before = kEqual;
      } else {
        if (target) target->word(lower_);
        tail_.word = true;
        if (!answer_.active && info.kind != kStop) {
          bool plural = length > 3 && last == 's' && second_last != 's';
          add_word(mix(plural ? before_last : hash));
        }
        before = kWord;
        short_word = length == 1 || info.abbreviation;
      }
      continue;
    }
    // ---- ends of lines and sentences
    bool line = c == '\n';
    bool stop = false;
    if (c == '.' || c == '!' || c == '?' || c == ';') {
      char n = at + 1 < t.size() ? t[at + 1] : '\n';
      stop = is_space(n) || n == '\n' || n == '"' || n == '\'' || n == ')' || n == '*' || n == ']';
    }
    if (line || stop) {
      ++at;
      if (stop && c == '.' && before == kWord && short_word && !is_gap(t[here - 1])) continue;
      if (answer_.active)
        settle(answer_);
      else
        flush();
      reset_step();
      before = kStart;
      asked = false;
      start_of_line = line;
      continue;
    }
    // ---- marks of several bytes
    if (c == '<' && at + 1 < t.size() && t[at + 1] == '<') {
      std::size_t end = 0;
      if (is_note(t, at, end)) {
        at = before == kEqual ? end : at + 2;
        continue;
      }
    }
    if ((c == '#' && t.compare(at, 4, "####") == 0) || (asked && (c == ':' || c == '='))) {
      at += c == '#' ? 4 : 1;
      begin_answer();
      asked = false;
      before = kStart;
      continue;
    }
    char op = 0;
    if (c == '\\' && at + 1 < t.size() && static_cast<unsigned char>(t[at + 1]) < 0x80 &&
        is_letter(static_cast<unsigned char>(t[at + 1]))) {
      std::size_t end = at + 1;
      while (end < t.size() && static_cast<unsigned char>(t[end]) < 0x80 &&
             is_letter(static_cast<unsigned char>(t[end])))
        ++end;
      std::string_view command = t.substr(at + 1, end - at - 1);
      at = end;
      if (command == "boxed") {
        boxed_.begin();
        depth = 0;
      } else if (command == "times" || command == "cdot") {
        op = '*';
      } else if (command == "div") {
        op = '/';
      }
      if (op == 0) continue;
    } else if (c == '*' && at + 1 < t.size() && t[at + 1] == '*') {
      while (at < t.size() && t[at] == '*') ++at;
      continue;
    } else if (c == '-' || c == '+' || c == '*' || c == '/' || c == '=') {
      ++at;
      op = c;
    } else {
      ++at;
      if (c == '{') {
        ++depth;
      } else if (c == '}') {
        --depth;
        if (boxed_.active && depth <= 0)
          settle(boxed_);
        else if (at < t.size() && t[at] == '{')
          op = '/';  // \frac{a}{b}
      } else if (c == ')' || c == ']') {
        before = kClose;
      } else if (c == ',' || c == ':') {
        before = kStart;
        tail_.comma = true;
      }
      if (op == 0) continue;
    }
    // ---- operators
    if (op == '=') {
      if (target) target->equals();
      if (!answer_.active && has_tail_ && tail_.begins_equation()) {
        Step rest;
        std::swap(rest, tail_);
        has_tail_ = false;
        flush();
        reset_step();
        std::swap(step_, rest);
      }
      before = kEqual;
      continue;
    }
    if (op == '-') {
      negative = before == kStart || before == kOperator || before == kEqual;
      if (negative) continue;  // a sign
    }
    if (target) target->divide(op == '/');
    if (!answer_.active) {
      if (has_tail_ && tail_.numbers.empty() && (op != '-' || before == kNumber)) retract();
      (has_tail_ ? tail_ : step_).operators |= operator_bit(op);
    }
    before = kOperator;
  }
  if (boxed_.active) settle(boxed_);
  if (answer_.active)
    settle(answer_);
  else
    flush();
  return !too_long_;
}

// The last result, or the last computed one if the last step speaks of it.
void Parser::imply_answer() {
  const StepGraphs& g = *out_;
  std::int64_t last = -1, stated = -1;
  for (auto i = static_cast<std::int64_t>(first_node_); i < static_cast<std::int64_t>(g.nodes()); ++i) {
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
  out_ = &g;
  first_node_ = g.nodes();
  const std::size_t first_number = g.numbers.size(), first_edge = g.edge_source.size();
  if (!run(text)) {
    g.result.resize(first_node_);
    g.result_kind.resize(first_node_);
    g.operators.resize(first_node_);
    g.signature.resize(first_node_);
    g.cu_numbers.resize(first_node_ + 1);
    g.numbers.resize(first_number);
    g.edge_source.resize(first_edge);
    g.edge_target.resize(first_edge);
    g.edge_type.resize(first_edge);
    return false;
  }
  if (answer_kind_ == kNoAnswer) imply_answer();
  g.answer.push_back(answer_key_);
  g.answer_kind.push_back(answer_kind_);
  sort_hashes(shingles_, sorted_);
  g.shingles.insert(g.shingles.end(), sorted_.begin(),
                    std::unique(sorted_.begin(), sorted_.end()));
  g.cu_nodes.push_back(static_cast<std::int64_t>(g.nodes()));
  g.cu_edges.push_back(static_cast<std::int64_t>(g.edge_source.size()));
  g.cu_shingles.push_back(static_cast<std::int64_t>(g.shingles.size()));
  return true;
}

bool Parser::answer_key(std::string_view text, std::int64_t& key) {
  // line ends inside a given answer separate nothing
  std::string marked = "#### ";
  for (char c : text) marked.push_back(c == '\n' ? ' ' : c);
  StepGraphs scratch;
  out_ = &scratch;
  first_node_ = 0;
  run(marked);
  if (answer_kind_ != kExplicitAnswer) return false;
  key = answer_key_;
  return true;
}

}  // namespace compact
