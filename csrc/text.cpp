#include "text.h"

#include <array>
#include <cstring>

namespace compact {

std::uint64_t fnv(std::string_view bytes, std::uint64_t seed) {
  for (unsigned char c : bytes) seed = fnv_step(seed, c);
  return seed;
}

namespace {

struct Replacement {
  const char* from;  // one UTF-8 encoded character
  const char* to;
};

constexpr std::array<Replacement, 32> kReplacements{{
    {"\xC3\x97", "*"},        {"\xE2\x8B\x85", "*"},    {"\xC2\xB7", "*"},
    {"\xC3\xB7", "/"},        {"\xE2\x88\x92", "-"},    {"\xE2\x80\x93", "-"},
    {"\xE2\x80\x94", " , "},  {"\xE2\x80\x99", "'"},    {"\xE2\x80\x98", "'"},
    {"\xE2\x80\x9C", "\""},   {"\xE2\x80\x9D", "\""},   {"\xE2\x80\xA2", "\n"},
    {"\xC2\xA0", " "},        {"\xE2\x80\xAF", " "},    {"\xE2\x80\x89", " "},
    {"\xE2\x89\x88", "="},    {"\xE2\x82\xAC", "$"},    {"\xC2\xA3", "$"},
    {"\xC2\xA5", "$"},        {"\xC2\xBD", " 1/2 "},    {"\xC2\xBC", " 1/4 "},
    {"\xC2\xBE", " 3/4 "},    {"\xE2\x85\x93", " 1/3 "}, {"\xE2\x85\x94", " 2/3 "},
    {"\xE2\x80\xA8", "\n"},   {"\xE3\x80\x81", ","},    {"\xE3\x80\x82", ". "},
    {"\xEF\xBC\x8C", ", "},   {"\xEF\xBC\x9A", ":"},    {"\xEF\xBB\xBF", " "},
    {nullptr, nullptr},       {nullptr, nullptr},
}};

// The first byte from `at` on that is not ASCII, or the end.
std::size_t end_of_ascii(std::string_view text, std::size_t at) {
  for (std::uint64_t eight; at + 8 <= text.size(); at += 8) {
    std::memcpy(&eight, text.data() + at, 8);
    if (eight & 0x8080808080808080ull) break;
  }
  while (at < text.size() && static_cast<unsigned char>(text[at]) < 0x80) ++at;
  return at;
}

}  // namespace

std::string_view normalise(std::string_view text, std::string& out) {
  std::size_t at = end_of_ascii(text, 0);
  if (at == text.size()) return text;
  out.assign(text.data(), at);
  while (at < text.size()) {
    const std::size_t plain = end_of_ascii(text, at);
    out.append(text.data() + at, plain - at);
    at = plain;
    if (at == text.size()) break;
    const Replacement* found = nullptr;
    std::size_t length = 1;
    for (const auto& r : kReplacements) {
      if (r.from == nullptr) break;
      if (r.from[0] != text[at]) continue;
      std::size_t n = std::strlen(r.from);
      if (text.size() - at >= n && std::memcmp(r.from, text.data() + at, n) == 0) {
        found = &r;
        length = n;
        break;
      }
    }
    if (found != nullptr) {
      out.append(found->to);
      at += length;
    } else {
      // keep the whole character, so that its tail is never read as the start of another
      do {
        out.push_back(text[at++]);
      } while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
    }
  }
  return out;
}

}  // namespace compact
