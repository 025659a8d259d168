#include "numbers.h"

#include "text.h"

namespace compact {

namespace {
bool digit_at(std::string_view text, std::size_t at) {
  return at < text.size() && is_digit(static_cast<unsigned char>(text[at]));
}
}  // namespace

std::size_t scan_number(std::string_view text, std::size_t at) {
  if (!digit_at(text, at)) {
    if (at >= text.size() || text[at] != '.' || !digit_at(text, at + 1)) return at;
    ++at;
    while (digit_at(text, at)) ++at;
    return at;
  }
  std::size_t start = at;
  while (digit_at(text, at)) ++at;
  if (at - start <= 3) {
    while (at < text.size() && text[at] == ',' && digit_at(text, at + 1) &&
           digit_at(text, at + 2) && digit_at(text, at + 3) && !digit_at(text, at + 4)) {
      at += 4;
    }
  }
  if (at < text.size() && text[at] == '.' && digit_at(text, at + 1)) {
    ++at;
    while (digit_at(text, at)) ++at;
  }
  return at;
}

std::int64_t number_key(std::string_view spelling) {
  std::int64_t whole = 0, micro = 0;
  int whole_digits = 0, decimals = 0;
  bool point = false;
  for (char c : spelling) {
    if (c == ',') continue;
    if (c == '.') {
      point = true;
    } else if (!point) {
      if (whole_digits == 0 && c == '0') continue;
      if (++whole_digits <= 12) whole = whole * 10 + (c - '0');
    } else if (++decimals <= 6) {
      micro = micro * 10 + (c - '0');
    } else if (decimals == 7 && c >= '5') {
      micro += 1;
    }
  }
  if (whole_digits <= 12) {
    for (int i = decimals; i < 6; ++i) micro *= 10;
    return whole * kMicro + micro;
  }
  // whole digits without leading zeros, ".", decimals without trailing zeros
  std::size_t end = spelling.size();
  if (point) {
    while (spelling[end - 1] == '0') --end;
  }
  std::uint64_t hash = kFnvStart;
  bool leading = true;
  bool after_point = false;
  for (std::size_t i = 0; i < end; ++i) {
    char c = spelling[i];
    if (c == ',') continue;
    if (c == '.') after_point = true;
    if (leading && c == '0' && !after_point) continue;
    leading = false;
    hash = fnv_step(hash, static_cast<unsigned char>(c));
  }
  if (!after_point) hash = fnv_step(hash, '.');
  return hash_key(mix(hash));
}

bool fraction_key(std::int64_t a, std::int64_t b, std::int64_t& key) {
  bool negative = (a < 0) != (b < 0);
  std::uint64_t x = a < 0 ? 0 - static_cast<std::uint64_t>(a) : static_cast<std::uint64_t>(a);
  std::uint64_t y = b < 0 ? 0 - static_cast<std::uint64_t>(b) : static_cast<std::uint64_t>(b);
  const auto huge = static_cast<std::uint64_t>(kHuge);
  if (y == 0 || x >= huge || y >= huge) return false;
  // long division, so that no product of 128 bits is needed
  std::uint64_t quotient = x / y, rest = x % y;
  for (int i = 0; i < 6; ++i) {
    if (quotient > huge / 10) return false;
    // rest < y < 2^62, so rest * 10 may overflow: double and add with reduction
    std::uint64_t digit = 0, sum = 0;
    for (int bit = 3; bit >= 0; --bit) {  // 10 = 0b1010
      sum *= 2, digit *= 2;
      if (sum >= y) sum -= y, ++digit;
      if ((10 >> bit) & 1) {
        sum += rest;
        if (sum >= y) sum -= y, ++digit;
      }
    }
    quotient = quotient * 10 + digit;
    rest = sum;
  }
  if (quotient >= huge) return false;
  key = negative ? -static_cast<std::int64_t>(quotient) : static_cast<std::int64_t>(quotient);
  return true;
}

}  // namespace compact
