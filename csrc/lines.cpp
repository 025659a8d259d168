#include "lines.h"

#include <algorithm>

#include "text.h"

namespace compact {

namespace {

// "Step 3", with ":", ".", ")" or "-" behind it, at `at`: the end, or `at` if it is not there.
std::size_t skip_step_name(std::string_view t, std::size_t at) {
  const auto gap = [&](std::size_t i) { return i < t.size() && is_gap(t[i]); };
  if (at >= t.size() || (t[at] != 'S' && t[at] != 's')) return at;
  if (t.substr(at + 1, 3) != "tep" || !gap(at + 4)) return at;
  std::size_t p = at + 4;
  while (gap(p)) ++p;
  const std::size_t digits = p;
  while (p < t.size() && p - digits < 4 && is_digit(static_cast<unsigned char>(t[p]))) ++p;
  if (p == digits) return at;
  while (gap(p)) ++p;
  const char c = p < t.size() ? t[p] : '\0';
  return c == ':' || c == '.' || c == ')' || c == '-' ? p + 1 : p;
}

// "12." "12)" "(12)" or "(a)" with a gap behind it, at `at`: the end, or `at` if it is not there.
std::size_t skip_number_mark(std::string_view t, std::size_t at) {
  const auto get = [&](std::size_t i) { return i < t.size() ? t[i] : '\0'; };
  std::size_t p = at;
  if (get(p) == '(') ++p;
  const std::size_t digits = p;
  while (is_digit(static_cast<unsigned char>(get(p)))) ++p;
  if (p > digits && p - digits <= 3 && (get(p) == '.' || get(p) == ')') && is_gap(get(p + 1)))
    return p + 1;
  const auto letter = static_cast<unsigned char>(get(at + 1));
  if (get(at) == '(' && letter < 0x80 && is_letter(letter) && get(at + 2) == ')' &&
      is_gap(get(at + 3)))
    return at + 3;
  return at;
}

}  // namespace

std::size_t skip_line_start(std::string_view t, std::size_t at) {
  while (at < t.size()) {
    const char c = t[at];
    const bool mark = is_gap(c) || c == '*' || c == '>' || c == '_' ||
                      (c == '#' && t.substr(at + 1, 3) != "###") ||
                      (c == '-' && at + 1 < t.size() && is_gap(t[at + 1]));
    if (!mark) break;
    ++at;
  }
  const std::size_t behind = skip_step_name(t, at);
  return behind != at ? behind : skip_number_mark(t, at);
}

bool is_note(std::string_view t, std::size_t at, std::size_t& end) {
  std::size_t p = at + 2;
  const std::size_t limit = std::min(t.size(), at + 203);
  while (p < limit && t[p] != '<' && t[p] != '>' && t[p] != '\n') ++p;
  if (p + 1 >= t.size() || p - (at + 2) > 200 || t[p] != '>' || t[p + 1] != '>') return false;
  end = p + 2;
  return true;
}

}  // namespace compact
