#include "similarity.h"

#include <algorithm>

#include "simd.h"

namespace compact {

namespace {

// The population counts need POPCNT to be quick; the plain twin gives the same numbers.
COMPACT_TARGET_POPCNT void overlap_popcnt(const Signature& a, const Signature* b, std::int64_t n,
                                          std::int32_t* common) {
  for (std::int64_t j = 0; j < n; ++j) {
    std::int32_t sum = 0;
    for (int w = 0; w < 8; ++w)
      sum += static_cast<std::int32_t>(COMPACT_POPCOUNT(a[w] & b[j][w]));
    common[j] = sum;
  }
}

std::int32_t popcount_plain(std::uint64_t x) {
  x = x - ((x >> 1) & 0x5555555555555555ull);
  x = (x & 0x3333333333333333ull) + ((x >> 2) & 0x3333333333333333ull);
  x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0Full;
  return static_cast<std::int32_t>((x * 0x0101010101010101ull) >> 56);
}

void overlap_plain(const Signature& a, const Signature* b, std::int64_t n, std::int32_t* common) {
  for (std::int64_t j = 0; j < n; ++j) {
    std::int32_t sum = 0;
    for (int w = 0; w < 8; ++w) sum += popcount_plain(a[w] & b[j][w]);
    common[j] = sum;
  }
}

std::int32_t size_of(const Signature& s) {
  std::int32_t sum = 0;
  for (std::uint64_t word : s) sum += popcount_plain(word);
  return sum;
}

std::int32_t dice(std::int32_t common, std::int32_t total) {
  return static_cast<std::int32_t>((std::int64_t{2} * common * kOne) / total);
}

std::int32_t common_numbers(const std::int64_t* a, const std::int64_t* a_end, const std::int64_t* b,
                            const std::int64_t* b_end) {
  std::int32_t common = 0;
  while (a != a_end && b != b_end) {
    if (*a == *b)
      ++common, ++a, ++b;
    else if (*a < *b)
      ++a;
    else
      ++b;
  }
  return common;
}

// Rows have length 127 up to rounding; equal rows count as wholly alike.
std::int32_t cosine(const std::int8_t* p, const std::int8_t* q, std::int64_t width) {
  std::int64_t dot = 0;
  bool equal = true;
  for (std::int64_t d = 0; d < width; ++d) {
    dot += std::int32_t{p[d]} * q[d];
    equal = equal && p[d] == q[d];
  }
  if (equal) return kOne;
  return dot <= 0 ? 0 : static_cast<std::int32_t>(std::min<std::int64_t>(dot * kOne / (127 * 127), kOne));
}

std::int32_t importance(const StepGraphs& g, std::int64_t i, const Options& o) {
  if (g.result_kind[i] == kStatedResult) return o.step_stated;
  bool numbers = g.result_kind[i] != kNoResult || g.cu_numbers[i + 1] != g.cu_numbers[i];
  return numbers ? o.step_numbers : o.step_words;
}

}  // namespace

void similarity(const StepGraphs& a, std::int64_t a0, std::int64_t a1, const StepGraphs& b,
                std::int64_t b0, std::int64_t b1, const Options& o, const Embeddings& ea,
                const Embeddings& eb, std::vector<std::int32_t>& out) {
  const std::int64_t n = a1 - a0, m = b1 - b0;
  const bool embedded = ea.rows != nullptr && eb.rows != nullptr;
  out.resize(static_cast<std::size_t>(n * m));
  if (n == 0 || m == 0) return;
  thread_local std::vector<std::int32_t> common, sizes, weights;
  common.resize(static_cast<std::size_t>(m));
  sizes.resize(static_cast<std::size_t>(m));
  weights.resize(static_cast<std::size_t>(m));
  for (std::int64_t j = 0; j < m; ++j) {
    sizes[j] = size_of(b.signature[b0 + j]);
    weights[j] = importance(b, b0 + j, o);
  }
  const bool quick = simd_level() > 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t x = a0 + i;
    const std::int32_t size = size_of(a.signature[x]), weight = importance(a, x, o);
    const bool x_result = a.result_kind[x] != kNoResult;
    const std::int64_t x_numbers = a.cu_numbers[x + 1] - a.cu_numbers[x];
    (quick ? overlap_popcnt : overlap_plain)(a.signature[x], &b.signature[b0], m, common.data());
    for (std::int64_t j = 0; j < m; ++j) {
      const std::int64_t y = b0 + j;
      std::int64_t sum = 0, total = 0;
      auto add = [&](std::int32_t w, std::int32_t value) {
        sum += std::int64_t{w} * value;
        total += w;
      };
      const bool y_result = b.result_kind[y] != kNoResult;
      if (x_result || y_result)
        add(o.weight_result, x_result && y_result && a.result[x] == b.result[y] ? kOne : 0);
      const std::int64_t y_numbers = b.cu_numbers[y + 1] - b.cu_numbers[y];
      if (x_numbers + y_numbers > 0) {
        const std::int64_t *p = a.numbers.data() + a.cu_numbers[x], *q = b.numbers.data() + b.cu_numbers[y];
        add(o.weight_numbers, dice(common_numbers(p, p + x_numbers, q, q + y_numbers),
                                   static_cast<std::int32_t>(x_numbers + y_numbers)));
      }
      const bool numeric = x_result || y_result || x_numbers + y_numbers > 0;
      const std::uint8_t ops_x = a.operators[x], ops_y = b.operators[y];
      if (ops_x | ops_y)
        add(o.weight_operators,
            dice(popcount_plain(ops_x & ops_y), popcount_plain(ops_x) + popcount_plain(ops_y)));
      if (size + sizes[j] > 0)
        add(numeric ? o.weight_text : 1024, dice(common[j], size + sizes[j]));
      if (embedded) {
        const std::int8_t *p = ea.rows + x * ea.width, *q = eb.rows + y * eb.width;
        add(o.weight_embedding, cosine(p, q, ea.width));
      }
      std::int64_t s = total > 0 ? sum / total : 0;
      if (s <= o.ramp_low)
        s = 0;
      else if (s >= o.ramp_high)
        s = kOne;
      else
        s = (s - o.ramp_low) * kOne / (o.ramp_high - o.ramp_low);
      out[static_cast<std::size_t>(i * m + j)] =
          static_cast<std::int32_t>(s * std::min(weight, weights[j]) / 256);
    }
  }
}

void self_similarity(const StepGraphs& a, std::int64_t a0, std::int64_t a1, const Options& o,
                     bool embedded, std::vector<std::int32_t>& out) {
  out.resize(static_cast<std::size_t>(a1 - a0));
  for (std::int64_t i = a0; i < a1; ++i) {
    const bool result = a.result_kind[i] != kNoResult;
    const bool numbers = a.cu_numbers[i + 1] > a.cu_numbers[i];
    const bool words = size_of(a.signature[i]) > 0;
    const bool alike = (result && o.weight_result > 0) || (numbers && o.weight_numbers > 0) ||
                       (a.operators[i] && o.weight_operators > 0) ||
                       (words && ((!result && !numbers) || o.weight_text > 0)) ||
                       (embedded && o.weight_embedding > 0);
    out[i - a0] = alike ? kOne * importance(a, i, o) / 256 : 0;
  }
}

}  // namespace compact
