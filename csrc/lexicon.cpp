#include "lexicon.h"

namespace compact {

namespace {

constexpr std::string_view kStopWords[] = {
    "a",     "an",    "and",       "are",  "as",    "at",   "be",    "been",   "by",   "can",
    "do",    "does",  "for",       "from", "had",   "has",  "have",  "he",     "her",  "his",
    "if",    "in",    "into",      "is",   "it",    "its",  "of",    "on",     "or",   "she",
    "so",    "that",  "the",       "them", "their", "then", "there", "they",   "this", "to",
    "was",   "we",    "were",      "will", "with",  "you",  "therefore", "thus", "hence", "step",
    "first", "second", "next",     "finally", "because", "since", "i", "our"};
constexpr std::string_view kUnits[] = {
    "zero",    "",        "two",       "three",    "four",     "five",    "six",
    "seven",   "eight",   "nine",      "ten",      "eleven",   "twelve",  "thirteen",
    "fourteen", "fifteen", "sixteen",  "seventeen", "eighteen", "nineteen"};
constexpr std::string_view kTens[] = {"twenty", "thirty", "forty",  "fifty",
                                      "sixty",  "seventy", "eighty", "ninety"};
constexpr std::string_view kAbbreviations[] = {"mr", "mrs", "ms",   "dr", "st", "vs",    "etc",
                                               "eg", "ie",  "prof", "jr", "sr", "approx"};

// Open-addressed table, keyed by FNV hash and filled at compile time. Hashes stand apart, so that the
// common case, a word that is not here, touches one cache line.
class Lexicon {
 public:
  constexpr Lexicon() {
    for (std::string_view word : kStopWords) entry(word).kind = kStop;
    for (int i = 0; i < 20; ++i)
      if (!kUnits[i].empty()) set(kUnits[i], kNumberWord, i);
    for (int i = 0; i < 8; ++i) set(kTens[i], kNumberWord, 20 + 10 * i);
    set("plus", kOperatorWord, 1);
    set("minus", kOperatorWord, 2);
    set("times", kOperatorWord, 4);
    set("divided", kOperatorWord, 8);
    set("equals", kEquals, 0);
    set("answer", kAnswerWord, 0);
    set("answers", kAnswerWord, 0);
    for (std::string_view word : kAbbreviations) entry(word).abbreviation = true;
  }

  WordInfo find(std::uint64_t hash) const {
    for (std::size_t at = place(hash);; at = (at + 1) % kSize) {
      if (hash_[at] == hash) return info_[at];
      if (hash_[at] == 0) return {};
    }
  }

 private:
  static constexpr std::size_t kSize = 512;
  static constexpr std::size_t place(std::uint64_t hash) {
    return static_cast<std::size_t>((hash * 0x9E3779B97F4A7C15ull) >> 32) % kSize;
  }
  constexpr WordInfo& entry(std::string_view word) {
    const std::uint64_t hash = hash_of(word);
    std::size_t at = place(hash);
    while (hash_[at] != 0 && hash_[at] != hash) at = (at + 1) % kSize;
    hash_[at] = hash;
    return info_[at];
  }
  constexpr void set(std::string_view word, WordClass kind, int value) {
    WordInfo& e = entry(word);
    e.kind = kind;
    e.value = static_cast<std::uint8_t>(value);
  }
  std::uint64_t hash_[kSize] = {};
  WordInfo info_[kSize] = {};
};

constexpr Lexicon kLexicon;

}  // namespace

WordInfo find_word(std::uint64_t hash) { return kLexicon.find(hash); }

}  // namespace compact
