// What the core's tests share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

inline int checks = 0;

#define CHECK(condition)                                                         \
  do {                                                                           \
    ++checks;                                                                    \
    if (!(condition)) {                                                          \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);        \
      std::exit(1);                                                              \
    }                                                                            \
  } while (0)

using Random = std::mt19937_64;

inline std::int64_t below(Random& random, std::int64_t limit) {
  return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(limit));
}

inline std::vector<float> normals(Random& random, std::int64_t size, float spread) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> values(static_cast<std::size_t>(size));
  for (auto& value : values) value = normal(random);
  return values;
}
