// Bytes in, bytes and hashes out: normalisation of typographic characters, and the hash functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace compact {

// 64-bit FNV-1a, one byte at a time so that a word is hashed while it is read.
constexpr std::uint64_t kFnvStart = 0xCBF29CE484222325ull;
constexpr std::uint64_t fnv_step(std::uint64_t hash, unsigned char byte) {
  return (hash ^ byte) * 0x100000001B3ull;
}
std::uint64_t fnv(std::string_view bytes, std::uint64_t seed = kFnvStart);

// Finaliser of splitmix64: spreads a hash over all bits.
constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
constexpr std::uint64_t pair_hash(std::uint64_t a, std::uint64_t b) {
  return mix(a * 0x9E3779B97F4A7C15ull + b);
}

// Rewrites typographic operators, quotes, spaces, fractions and currency as ASCII; every other byte
// passes through, so any input (valid UTF-8 or not) is safe. Returns `text` itself where there is
// nothing to rewrite, else a view of `out`.
std::string_view normalise(std::string_view text, std::string& out);

constexpr bool is_gap(char c) { return c == ' ' || c == '\t'; }
constexpr bool is_digit(unsigned char c) { return c >= '0' && c <= '9'; }
constexpr bool is_letter(unsigned char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c >= 0x80;
}

}  // namespace compact
