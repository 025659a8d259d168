// A final answer as its tokens come in: a number, a fraction, a letter, yes / no, or words.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace compact {

// The number behind the last "=" counts, else the first number; "a / b" alone is a fraction; without
// numbers, a single letter or true / false, else the words that are not stop words.
struct Answer {
  bool active = false, has_first = false, after_equals = false;
  std::int64_t first = 0, second = 0;
  int fraction = 0, tokens = 0;
  std::vector<std::string> words;
  void begin();
  void number(std::int64_t key);
  void divide(bool slash);
  void equals();
  void word(std::string_view text);
  bool key(std::int64_t& out) const;
};

}  // namespace compact
