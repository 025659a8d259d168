#include "answer.h"

#include "lexicon.h"
#include "numbers.h"
#include "text.h"

namespace compact {

void Answer::begin() {
  active = true;
  has_first = after_equals = false;
  first = second = 0;
  fraction = tokens = 0;
  words.clear();
}

void Answer::number(std::int64_t key) {
  if (!has_first || after_equals) {
    first = key;
    has_first = true;
    fraction = 0;
    after_equals = false;
  } else if (fraction == 1 && tokens == 2) {
    second = key;
    fraction = 2;
  }
  ++tokens;
}

void Answer::divide(bool slash) {
  if (slash && tokens == 1 && has_first) fraction = 1;
  ++tokens;
}

void Answer::equals() {
  after_equals = true;
  tokens = 0;
}

void Answer::word(std::string_view text) {
  ++tokens;
  if (words.size() < 16) words.emplace_back(text);
}

bool Answer::key(std::int64_t& out) const {
  if (has_first) {
    if (fraction == 2 && fraction_key(first, second, out)) return true;
    out = first;
    return true;
  }
  if (words.empty()) return false;
  std::string head = words[0] == "yes" ? "true" : words[0] == "no" ? "false" : words[0];
  std::uint64_t hash = 0x12345;
  if (head == "true" || head == "false" || head.size() == 1) {
    hash = fnv(head, hash);
  } else {
    bool any = false;
    for (const auto& w : words) {
      if (find_word(hash_of(w)).kind == kStop) continue;
      if (any) hash = fnv_step(hash, ' ');
      hash = fnv(w, hash);
      any = true;
    }
    if (!any) hash = fnv(head, hash);
  }
  out = hash_key(mix(hash));
  return true;
}

}  // namespace compact
