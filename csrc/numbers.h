// Canonical integers for numbers as people write them.
#pragma once

#include <cstdint>
#include <string_view>

namespace compact {

constexpr std::int64_t kMicro = 1'000'000;
// Keys of numbers beyond 12 digits (and of answers in words): this bit plus a hash. All other keys
// are smaller in magnitude.
constexpr std::int64_t kHuge = std::int64_t{1} << 62;

constexpr std::int64_t hash_key(std::uint64_t hash) {
  return kHuge | static_cast<std::int64_t>(hash & (static_cast<std::uint64_t>(kHuge) - 1));
}

// Reads a number at `at`: digits with thousands separators and decimals, or ".5". Returns its end,
// or `at` if there is none.
std::size_t scan_number(std::string_view text, std::size_t at);

// Millionths (rounded half up), or a tagged hash beyond 12 digits. `spelling` is what scan_number
// delimited.
std::int64_t number_key(std::string_view spelling);

// a / b in millionths, truncated towards zero; false where that cannot be held.
bool fraction_key(std::int64_t a, std::int64_t b, std::int64_t& key);

}  // namespace compact
