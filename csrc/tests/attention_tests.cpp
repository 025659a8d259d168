// Attention by segments against sums in double, token by token; all memory exactly its size. Run by
// CTest, also under sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "check.h"
#include "simd.h"

using namespace compact;

#if COMPACT_VECTORS
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Prompts, some of them empty, and rationales behind each, some of one token.
std::vector<Segment> trees(Random& random, std::int64_t longest) {
  std::vector<Segment> segments;
  std::int64_t n = 0;
  for (std::int64_t tree = 1 + below(random, 3); tree > 0; --tree) {
    const std::int64_t prompt = below(random, 3) ? below(random, longest) : 0, begin = n;
    if (prompt > 0) segments.push_back({n, n, n, n + prompt});
    n += prompt;
    for (std::int64_t k = below(random, 5) + (prompt == 0); k > 0; --k) {
      const std::int64_t own = 1 + (below(random, 4) ? below(random, longest) : 0);
      segments.push_back({begin, begin + prompt, n, n + own});
      n += own;
    }
  }
  return segments;
}

struct Case {
  std::vector<Segment> segments;
  std::int64_t n, heads, kv_heads, d, window;
  float scale;
  Floats query, key, value, grad;
  std::int64_t query_stride, key_stride, value_stride;

  Case(Random& random, std::int64_t longest) : segments(trees(random, longest)) {
    n = segments.back().own_end;
    const std::int64_t widths[] = {16, 32, 48, 64, 80};
    kv_heads = 1 + below(random, 3), heads = kv_heads * (1 + below(random, 4));
    d = widths[below(random, 5)];
    window = below(random, 2) ? 1 + below(random, 2 * longest) : 0;
    scale = 0.5f / std::sqrt(static_cast<float>(d));
    const float spread = below(random, 4) ? 1.0f : 6.0f;
    query = heads_of(random, heads, spread, query_stride);
    key = heads_of(random, kv_heads, spread, key_stride);
    value = heads_of(random, kv_heads, 1.0f, value_stride);
    grad = normals(random, n * heads * d, 1.0f);
  }

  Floats heads_of(Random& random, std::int64_t count, float spread, std::int64_t& stride) const {
    stride = count * d + below(random, 2) * below(random, 40);
    return normals(random, (n - 1) * stride + count * d, spread);
  }

  Attention call() const {
    return {{query.data(), query_stride}, {key.data(), key_stride}, {value.data(), value_stride},
            segments.data(), static_cast<std::int64_t>(segments.size()), heads, kv_heads, d, window,
            scale, 1};
  }
};

struct Result {
  Floats out, logsumexp, g_query, g_key, g_value;

  explicit Result(const Case& c) {
    const auto nan = std::nanf("");  // nothing is added to what was there
    for (Floats* x : {&out, &g_query}) x->assign(at(c.n * c.heads * c.d), nan);
    for (Floats* x : {&g_key, &g_value}) x->assign(at(c.n * c.kv_heads * c.d), nan);
    logsumexp.assign(at(c.heads * c.n), nan);
    const Attention call = c.call();
    attend(call, c.n, out.data(), logsumexp.data());
    Floats room(at(attend_back_room(call)), nan);
    attend_back(call, c.n, c.grad.data(), out.data(), logsumexp.data(), g_query.data(),
                g_key.data(), g_value.data(), room.data());
  }

  bool operator==(const Result& o) const {
    return out == o.out && logsumexp == o.logsumexp && g_query == o.g_query && g_key == o.g_key &&
           g_value == o.g_value;
  }
};

// Every sum in double, and beside it the sum of its terms' sizes.
struct Exact {
  Doubles out, logsumexp, g_query, g_key, g_value, out_size, g_query_size, g_key_size, g_value_size;
  double largest = 0.0;  // score

  explicit Exact(const Case& c) {
    for (Doubles* x : {&out, &g_query, &out_size, &g_query_size})
      x->assign(at(c.n * c.heads * c.d), 0.0);
    for (Doubles* x : {&g_key, &g_value, &g_key_size, &g_value_size})
      x->assign(at(c.n * c.kv_heads * c.d), 0.0);
    logsumexp.assign(at(c.heads * c.n), 0.0);
    for (const Segment& s : c.segments)
      for (std::int64_t token = s.own_begin; token < s.own_end; ++token) {
        std::vector<std::int64_t> seen;
        for (std::int64_t k = s.root_begin; k < s.root_end; ++k) seen.push_back(k);
        for (std::int64_t k = s.own_begin; k <= token; ++k) seen.push_back(k);
        const auto count = static_cast<std::int64_t>(seen.size());
        if (c.window > 0 && count > c.window) seen.erase(seen.begin(), seen.end() - c.window);
        for (std::int64_t h = 0; h < c.heads; ++h) add(c, token, h, seen);
      }
  }

  void add(const Case& c, std::int64_t token, std::int64_t h, const std::vector<std::int64_t>& seen) {
    const std::int64_t kv = h / (c.heads / c.kv_heads), q = (token * c.heads + h) * c.d;
    const auto dot = [&](const Floats& x, std::int64_t i, const Floats& y, std::int64_t j) {
      double sum = 0.0;
      for (std::int64_t t = 0; t < c.d; ++t)
        sum += static_cast<double>(x[at(i + t)]) * static_cast<double>(y[at(j + t)]);
      return sum;
    };
    const std::int64_t query = token * c.query_stride + h * c.d;
    Doubles weight;
    double total = 0.0, along = 0.0;
    for (std::int64_t k : seen) {
      weight.push_back(c.scale * dot(c.query, query, c.key, k * c.key_stride + kv * c.d));
      largest = std::max(largest, std::abs(weight.back()));
    }
    for (double score : weight) total += std::exp(score);
    logsumexp[at(h * c.n + token)] = std::log(total);
    Doubles by;
    for (std::size_t i = 0; i < seen.size(); ++i) {
      weight[i] = std::exp(weight[i]) / total;
      by.push_back(dot(c.grad, q, c.value, seen[i] * c.value_stride + kv * c.d));
      along += weight[i] * by[i];
    }
    for (std::size_t i = 0; i < seen.size(); ++i) {
      const std::int64_t k = (seen[i] * c.kv_heads + kv) * c.d;
      const double g = c.scale * weight[i] * (by[i] - along);
      const double size = c.scale * weight[i] * (std::abs(by[i]) + std::abs(along) + 1.0);
      for (std::int64_t t = 0; t < c.d; ++t) {
        const double v = c.value[at(seen[i] * c.value_stride + kv * c.d + t)];
        const double x = c.key[at(seen[i] * c.key_stride + kv * c.d + t)];
        const double y = c.query[at(query + t)], z = c.grad[at(q + t)];
        term(out, out_size, q + t, weight[i] * v, weight[i] * std::abs(v));
        term(g_query, g_query_size, q + t, g * x, size * std::abs(x));
        term(g_key, g_key_size, k + t, g * y, size * std::abs(y));
        term(g_value, g_value_size, k + t, weight[i] * z, weight[i] * std::abs(z));
      }
    }
  }

  static void term(Doubles& sums, Doubles& sizes, std::int64_t i, double value, double size) {
    sums[at(i)] += value, sizes[at(i)] += size;
  }
};

void test_attention(int trials) {
  Random random(29);
  for (int trial = 0; trial < trials; ++trial) {
    const Case c(random, trial % 8 ? 12 : 150);
    const Exact exact(c);
    // a weight is as exact as its score, which is a sum of c.d terms
    const double unit = 1e-6 * (2.0 + 8.0 * exact.largest);
    for (int level : {0, 1, 2}) {
      force_simd_level(level);
      const Result found(c);
      CHECK(found == Result(c));
      const auto close = [&](const Floats& x, const Doubles& want, const Doubles& size) {
        for (std::size_t i = 0; i < want.size(); ++i)
          CHECK(std::abs(static_cast<double>(x[i]) - want[i]) <= unit * size[i] + 1e-30);
      };
      close(found.out, exact.out, exact.out_size);
      close(found.g_query, exact.g_query, exact.g_query_size);
      close(found.g_key, exact.g_key, exact.g_key_size);
      close(found.g_value, exact.g_value, exact.g_value_size);
      for (std::size_t i = 0; i < exact.logsumexp.size(); ++i)
        CHECK(std::abs(static_cast<double>(found.logsumexp[i]) - exact.logsumexp[i]) <= unit);
    }
    force_simd_level(-1);
  }
}

// Scores far apart: the largest takes all, and nothing overflows.
void test_large_scores() {
  const std::int64_t n = 40, d = 16;
  const Segment segment{0, 0, 0, n};
  Floats x(at(n * d), 0.0f), value(at(n * d)), out(at(n * d)), logsumexp(at(n));
  for (std::int64_t i = 0; i < n; ++i) {
    x[at(i * d)] = i % 2 ? 100.0f : -100.0f;
    for (std::int64_t t = 0; t < d; ++t) value[at(i * d + t)] = static_cast<float>(i);
  }
  const Attention a{{x.data(), d}, {x.data(), d}, {value.data(), d}, &segment, 1, 1, 1, d, 0, 1.0f, 1};
  for (int level : {0, 1, 2}) {
    force_simd_level(level);
    attend(a, n, out.data(), logsumexp.data());
    for (std::int64_t i = 0; i < n; ++i) {  // the mean of those of its own sign up to itself
      CHECK(std::abs(out[at(i * d)] - static_cast<float>((i % 2 + i) / 2.0)) <= 1e-5f * (1.0f + i));
      CHECK(std::abs(logsumexp[at(i)] - 10000.0f) <= 4.0f);
    }
  }
  force_simd_level(-1);
}

}  // namespace
#endif

int main(int argc, char** argv) {
  // attention_tests [TRIALS]
  const int trials = argc > 1 ? std::atoi(argv[1]) : 200;
#if COMPACT_VECTORS
  test_attention(trials);
  test_large_scores();
#else
  (void)trials;
#endif
  std::printf("%d checks passed\n", checks);
  return 0;
}
