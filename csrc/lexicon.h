// The words that mean something to the parser.
#pragma once

#include <cstdint>
#include <string_view>

#include "text.h"

namespace compact {

// The FNV hash under which a (lower-case) word is known.
constexpr std::uint64_t hash_of(std::string_view word) {
  std::uint64_t hash = kFnvStart;
  for (char c : word) hash = fnv_step(hash, static_cast<unsigned char>(c));
  return hash;
}

enum WordClass : std::uint8_t { kPlain, kStop, kNumberWord, kOperatorWord, kEquals, kAnswerWord };

struct WordInfo {
  WordClass kind = kPlain;
  std::uint8_t value = 0;  // of a number word, or the bit of an operator
  bool abbreviation = false;
};

// A word without an entry is kPlain.
WordInfo find_word(std::uint64_t hash);

}  // namespace compact
