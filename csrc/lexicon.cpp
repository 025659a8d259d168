#include "lexicon.h"

namespace compact {

namespace {

// Open-addressed table of the words with a meaning, keyed by FNV hash.
class Lexicon {
 public:
  Lexicon() {
    for (auto w :
         {"a",     "an",    "and",     "are",   "as",      "at",    "be",   "been",  "by",
          "can",   "do",    "does",    "for",   "from",    "had",   "has",  "have",  "he",
          "her",   "his",   "if",      "in",    "into",    "is",    "it",   "its",   "of",
          "on",    "or",    "she",     "so",    "that",    "the",   "them", "their", "then",
          "there", "they",  "this",    "to",    "was",     "we",    "were", "will",  "with",
          "you",   "therefore", "thus", "hence", "step",   "first", "second", "next", "finally",
          "because", "since", "i",     "our"})
      entry(w).kind = kStop;
    const char* units[] = {"zero",    "",        "two",       "three",    "four",
                           "five",    "six",     "seven",     "eight",    "nine",
                           "ten",     "eleven",  "twelve",    "thirteen", "fourteen",
                           "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"};
    for (int i = 0; i < 20; ++i)
      if (units[i][0]) set(units[i], kNumberWord, i);
    const char* tens[] = {"twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"};
    for (int i = 0; i < 8; ++i) set(tens[i], kNumberWord, 20 + 10 * i);
    set("plus", kOperatorWord, 1);
    set("minus", kOperatorWord, 2);
    set("times", kOperatorWord, 4);
    set("divided", kOperatorWord, 8);
    set("equals", kEquals, 0);
    set("answer", kAnswerWord, 0);
    set("answers", kAnswerWord, 0);
    for (auto w : {"mr", "mrs", "ms", "dr", "st", "vs", "etc", "eg", "ie", "prof", "jr", "sr", "approx"})
      entry(w).abbreviation = true;
  }

  const WordInfo& find(std::uint64_t hash) const {
    static constexpr WordInfo plain{0, kPlain, 0, false};
    for (std::size_t at = mix(hash) % kSize;; at = (at + 1) % kSize) {
      if (table_[at].hash == hash) return table_[at];
      if (table_[at].hash == 0) return plain;
    }
  }

 private:
  static constexpr std::size_t kSize = 1024;
  WordInfo& entry(std::string_view word) {
    std::uint64_t hash = hash_of(word);
    for (std::size_t at = mix(hash) % kSize;; at = (at + 1) % kSize) {
      if (table_[at].hash == 0) table_[at] = {hash, kPlain, 0, false};
      if (table_[at].hash == hash) return table_[at];
    }
  }
  void set(std::string_view word, WordClass kind, int value) {
    WordInfo& e = entry(word);
    e.kind = kind;
    e.value = static_cast<std::uint8_t>(value);
  }
  WordInfo table_[kSize] = {};
};

}  // namespace

const WordInfo& find_word(std::uint64_t hash) {
  static const Lexicon words;
  return words.find(hash);
}

}  // namespace compact
