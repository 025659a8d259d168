// Tests of the core without Python: by hand, by brute force, and on random bytes. Run by CTest, also
// under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "consensus.h"
#include "layers.h"
#include "numbers.h"
#include "pairs.h"
#include "parallel.h"
#include "products.h"
#include "row_softmax.h"
#include "simd.h"
#include "text.h"

using namespace compact;

namespace {

Options default_options() {
  Options o;
  o.weight_result = 358, o.weight_numbers = 307, o.weight_operators = 102, o.weight_text = 102;
  o.ramp_low = 6554, o.ramp_high = 26214;
  o.answer_share = 819, o.soundness = 154, o.dedupe = 717, o.dedupe_min_shingles = 12;
  return o;
}

void test_numbers() {
  auto key = [](std::string_view text) {
    CHECK(scan_number(text, 0) == text.size());
    return number_key(text);
  };
  CHECK(key("1,234.5") == 1'234'500'000);
  CHECK(key("007") == 7'000'000);
  CHECK(key(".5") == 500'000);
  CHECK(key("0.1234565") == 123'457);
  CHECK(key("123456789012345") == key("0123456789012345.000"));
  CHECK(key("123456789012345") != key("123456789012346"));
  CHECK(scan_number("1,2345", 0) == 1);
  CHECK(scan_number("5.", 0) == 1);
  CHECK(scan_number("x", 0) == 0);
  std::int64_t out = 0;
  CHECK(fraction_key(1 * kMicro, 3 * kMicro, out) && out == 333'333);
  CHECK(fraction_key(-7 * kMicro, 2 * kMicro, out) && out == -3'500'000);
  CHECK(!fraction_key(1, 0, out));
  CHECK(!fraction_key(kHuge, 1, out));
  CHECK(!fraction_key(kHuge - 1, 1, out));
}

void test_parse() {
  Parser parser;
  StepGraphs g;
  CHECK(parser.parse("2 + 3 = 5\n4 + 4 = 8\n5 * 8 = 40\nThe answer is 40.", g));
  CHECK(g.size() == 1 && g.nodes() == 3);
  CHECK(g.result[2] == 40 * kMicro && g.operators[2] == 4);
  CHECK(g.answer[0] == 40 * kMicro && g.answer_kind[0] == kExplicitAnswer);
  CHECK(g.edge_source.size() == 4);  // 0-1, 1-2 follow; 2 uses 0 and 1
  parser.set_limit(2);
  CHECK(!parser.parse("b\nc\nd\n", g));
  CHECK(g.size() == 1 && g.nodes() == 3 && g.cu_numbers.size() == 4);
  CHECK(parser.parse("b\nc", g) && g.size() == 2);
}

std::int64_t brute_assignment(const std::vector<std::int32_t>& w, std::int64_t n, std::int64_t m) {
  std::vector<std::int64_t> columns(static_cast<std::size_t>(std::max(n, m)));
  std::iota(columns.begin(), columns.end(), 0);
  std::int64_t best = 0;
  do {
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i)
      if (columns[i] < m) sum += w[i * m + columns[i]];
    best = std::max(best, sum);
  } while (std::next_permutation(columns.begin(), columns.end()));
  return best;
}

void test_assignment(int rounds) {
  Random random(1);
  Assignment lap;
  for (int round = 0; round < rounds; ++round) {
    const std::int64_t n = below(random, 6), m = below(random, 7);
    const std::int64_t high = round % 3 ? 4 : (round % 2 ? 1 << 17 : (1 << 30) - 1);
    std::vector<std::int32_t> w(static_cast<std::size_t>(n * m));
    for (auto& x : w) x = static_cast<std::int32_t>(below(random, high));
    std::vector<std::int32_t> assigned(static_cast<std::size_t>(n));
    const std::int64_t value = lap.solve(w.data(), n, m, assigned.data());
    CHECK(value == brute_assignment(w, n, m));
    force_simd_level(0);
    std::vector<std::int32_t> plain(static_cast<std::size_t>(n));
    CHECK(lap.solve(w.data(), n, m, plain.data()) == value);
    force_simd_level(-1);
    CHECK(plain == assigned);
  }
}

struct Edges {
  std::vector<std::int32_t> source, target;
  std::vector<std::uint8_t> type;
  EdgeList list() const {
    return {source.data(), target.data(), type.data(), static_cast<std::int64_t>(source.size())};
  }
  static Edges random(Random& r, std::int64_t n) {
    Edges e;
    for (std::int32_t i = 0; i < n; ++i)
      for (std::int32_t j = i + 1; j < n; ++j)
        for (std::uint8_t type = 0; type < 2; ++type)
          if (below(r, 3) == 0) e.source.push_back(i), e.target.push_back(j), e.type.push_back(type);
    return e;
  }
};

void test_matching(int rounds) {
  Random random(2);
  Matcher matcher;
  const std::int32_t half[2] = {16, 32};
  for (int round = 0; round < rounds; ++round) {
    const std::int64_t n = below(random, 7), m = below(random, 7);
    std::vector<std::int32_t> s(static_cast<std::size_t>(n * m));
    for (auto& x : s) x = below(random, 2) ? static_cast<std::int32_t>(below(random, kOne + 1)) : 0;
    const Edges a = Edges::random(random, n), b = Edges::random(random, m);
    auto match = [&](Mode mode) {
      return matcher.match(mode, s.data(), n, m, a.list(), b.list(), half, 1'000'000, nullptr);
    };
    const auto relaxed = match(Mode::kRelaxed), exact = match(Mode::kExact), fast = match(Mode::kFast);
    CHECK(relaxed.value >= exact.value && exact.value >= fast.value && exact.proven);
    // brute force over injections of the smaller side into the larger
    std::vector<std::int64_t> columns(static_cast<std::size_t>(std::max(n, m)));
    std::iota(columns.begin(), columns.end(), 0);
    std::int64_t best = 0;
    do {
      std::int64_t total = 0;
      for (std::int64_t i = 0; i < n; ++i)
        if (columns[i] < m) total += std::int64_t{s[i * m + columns[i]]} << 23;
      for (std::size_t e = 0; e < a.source.size(); ++e)
        for (std::size_t f = 0; f < b.source.size(); ++f)
          if (a.type[e] == b.type[f] && columns[a.source[e]] == b.source[f] &&
              columns[a.target[e]] == b.target[f])
            total += std::int64_t{2} * half[a.type[e]] * s[a.source[e] * m + b.source[f]] *
                     s[a.target[e] * m + b.target[f]];
      best = std::max(best, total);
    } while (std::next_permutation(columns.begin(), columns.end()));
    CHECK(exact.value == best >> 23);
  }
}

std::string random_text(Random& random) {
  static const char* pieces[] = {"=", " + ", "-", "*", "/", "12", "3.5", "1,200", "\n", ". ", " ",
                                 "answer is ", "####", "\\boxed{", "}", "{", "\\frac{", "<<", ">>",
                                 "Step 1:", "apples ", "\xC3\x97", "\xE2\x88\x92", "\xE2", "\0", "seven"};
  std::string out;
  const std::int64_t length = below(random, 40);
  for (std::int64_t i = 0; i < length; ++i) {
    if (below(random, 4) == 0)
      out.push_back(static_cast<char>(below(random, 256)));
    else
      out += pieces[below(random, 26)];
  }
  return out;
}

// Random bytes through the whole way: nothing may break, and threads may not matter.
void test_random_questions(int questions) {
  Random random(3);
  std::vector<std::string> held;
  std::vector<std::int64_t> cu{0}, cu_agreement{0};
  for (int q = 0; q < questions; ++q) {
    const std::int64_t k = below(random, 6);
    for (std::int64_t t = 0; t < k; ++t)
      held.push_back(t > 0 && below(random, 4) == 0 ? held.back() : random_text(random));
    cu.push_back(cu.back() + k);
    cu_agreement.push_back(cu_agreement.back() + k * k);
  }
  const std::vector<std::string_view> texts(held.begin(), held.end());
  ConsensusOptions options;
  options.graph = default_options();
  auto score = [&](int threads, Mode mode) {
    options.mode = mode;
    std::vector<std::int64_t> agreement(static_cast<std::size_t>(cu_agreement.back()));
    std::vector<double> scores(texts.size());
    std::vector<std::int32_t> group(texts.size());
    std::vector<std::uint8_t> flags(static_cast<std::size_t>(questions));
    ParseError error;
    score_questions(texts, cu, {}, {}, options, threads, cu_agreement, agreement.data(),
                    scores.data(), group.data(), flags.data(), error);
    CHECK(error.text == -1);
    for (double x : scores) CHECK(x >= 0 && x <= 1);
    for (std::int64_t x : agreement) CHECK(x >= 0 && x <= kUnit);
    return scores;
  };
  const auto one = score(1, Mode::kRelaxed);
  CHECK(one == score(4, Mode::kRelaxed));
  score(4, Mode::kExact);

  std::vector<StepGraphs> parts;
  ParseError error;
  parse_all(texts, options.graph, 4, parts, error);
  CHECK(error.text == -1);
  Parser parser;
  parser.set_limit(options.graph.max_steps);
  StepGraphs graphs;  // the same, one after the other
  for (std::string_view text : texts) CHECK(parser.parse(text, graphs));
  std::vector<std::vector<unsigned char>> joined;
  Join join(parts, [&](const char*, std::size_t count, auto value) {
    using Value = decltype(value);
    joined.emplace_back(count * sizeof(Value));
    return reinterpret_cast<Value*>(joined.back().data());
  });
  join.run(4);
  std::size_t column = 0;
  each_column([&](const char*, auto member, bool) {
    const auto& wanted = graphs.*member;
    const auto& found = joined[column++];
    CHECK(found.size() == wanted.size() * sizeof(wanted[0]));
    CHECK(found.empty() || std::memcmp(found.data(), wanted.data(), found.size()) == 0);
  });
}

void test_parallel() {
  std::vector<int> done(1000, 0);
  parallel_for(1000, 7, 4, [&](std::int64_t a, std::int64_t b, int) {
    for (; a < b; ++a) ++done[static_cast<std::size_t>(a)];
  });
  CHECK(std::count(done.begin(), done.end(), 1) == 1000);
  bool caught = false;
  try {
    parallel_for(100, 1, 3, [&](std::int64_t a, std::int64_t, int) {
      if (a == 50) throw std::runtime_error("fifty");
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught);
  parallel_for(0, 1, 2, [&](std::int64_t, std::int64_t, int) { CHECK(false); });
}

#if COMPACT_VECTORS
// Rows of every width in ragged blocks, against double; memory of each block exactly its size.
void test_row_softmax() {
  Random random(11);
  std::normal_distribution<float> normal(0.0f, 4.0f);
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t n = 1 + below(random, 5), vocabulary = 1 + below(random, 200);
    const auto size = static_cast<std::size_t>(n);
    std::vector<float> peak(size, std::numeric_limits<float>::lowest() / 4), rest(size, 0.0f),
        at_target(size, -INFINITY), weighted(size, 0.0f), shrink(size);
    std::vector<std::uint8_t> preceded(size, 0);
    std::vector<std::int64_t> target(size);
    for (auto& t : target) t = below(random, vocabulary);
    const RunningRows rows{target.data(), peak.data(), rest.data(), at_target.data(),
                           weighted.data(), preceded.data()};
    std::vector<double> total(size, 0.0), mean(size, 0.0);
    std::vector<std::vector<float>> all(size);
    for (std::int64_t a = 0; a < vocabulary;) {
      const std::int64_t width = std::min(vocabulary - a, 1 + below(random, 90));
      std::vector<float> z(static_cast<std::size_t>(n * width));
      for (auto& value : z) value = normal(random);
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < width; ++j)
          all[static_cast<std::size_t>(i)].push_back(z[static_cast<std::size_t>(i * width + j)]);
      update_rows(z.data(), width, n, width, a, rows, shrink.data(), 2);
      for (float value : z) CHECK(value >= 0.0f && value <= 1.0f);
      a += width;
    }
    for (std::size_t i = 0; i < size; ++i) {
      double sum = 0.0, moment = 0.0;
      for (std::size_t v = 0; v < all[i].size(); ++v) {
        if (static_cast<std::int64_t>(v) == target[i]) {
          CHECK(all[i][v] == at_target[i]);
          continue;
        }
        const double x = static_cast<double>(all[i][v]) - static_cast<double>(peak[i]);
        CHECK(x <= 0.0);
        sum += std::exp(x), moment += std::exp(x) * x;
      }
      CHECK(std::abs(static_cast<double>(rest[i]) - sum) <= 1e-5 * (1.0 + sum));
      CHECK(std::abs(static_cast<double>(weighted[i]) - moment) <= 1e-5 * (1.0 - moment));
    }
  }
}

// Sets of rows in ragged blocks, against double.
void test_pairs() {
  Random random(13);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<std::int64_t> cu{0}, members;
    for (std::int64_t s = below(random, 4); s >= 0; --s)
      cu.push_back(cu.back() + 1 + below(random, s == 0 ? 16 : 5));
    const std::int64_t n = cu.back(), vocabulary = 1 + below(random, 60);
    for (std::int64_t i = 0; i < n; ++i) members.push_back(n - 1 - i);
    std::vector<std::vector<double>> z(static_cast<std::size_t>(n));
    for (auto& row : z)
      for (std::int64_t v = 0; v < vocabulary; ++v) row.push_back(normal(random));
    std::vector<double> lse;
    for (const auto& row : z) {
      double total = 0.0;
      for (double value : row) total += std::exp(value);
      lse.push_back(std::log(total));
    }
    std::vector<float> c, constant;
    std::vector<double> want;
    for (std::size_t s = 0; s + 1 < cu.size(); ++s)
      for (std::int64_t i = cu[s]; i < cu[s + 1]; ++i) {
        constant.push_back(normal(random));
        for (std::int64_t j = cu[s]; j < cu[s + 1]; ++j) {
          c.push_back(i == j ? 0.0f : static_cast<float>(1 + (i + j) % 5));
          const auto a = static_cast<std::size_t>(members[static_cast<std::size_t>(i)]);
          const auto b = static_cast<std::size_t>(members[static_cast<std::size_t>(j)]);
          double kl = 0.0;
          for (std::size_t v = 0; v < z[a].size(); ++v) {
            const double p = z[a][v] - lse[a], q = z[b][v] - lse[b];
            kl += std::exp(p) * (p - q);
          }
          want.push_back(kl);
        }
      }
    std::vector<double> kl(want.size(), 0.0);
    for (std::int64_t first = 0; first < vocabulary;) {
      const std::int64_t width = std::min(vocabulary - first, 1 + below(random, 40));
      std::vector<float> block;
      for (const auto& row : z)
        for (std::int64_t v = first; v < first + width; ++v)
          block.push_back(static_cast<float>(row[static_cast<std::size_t>(v)]));
      const RowSets sets{block.data(), width, width, static_cast<std::int64_t>(cu.size()) - 1,
                         cu.data(), members.data(), lse.data()};
      add_divergences(sets, kl.data(), 2);
      divergence_gradients(sets, constant.data(), c.data(), 2);
      std::size_t matrix = 0;
      for (std::size_t s = 0; s + 1 < cu.size(); ++s) {
        const std::int64_t size = cu[s + 1] - cu[s];
        for (std::int64_t i = 0; i < size; ++i) {
          const auto a = static_cast<std::size_t>(members[static_cast<std::size_t>(cu[s] + i)]);
          for (std::int64_t v = 0; v < width; ++v) {
            const auto at = static_cast<std::size_t>(first + v);
            const double p = z[a][at] - lse[a];
            double g = std::exp(p) * static_cast<double>(constant[static_cast<std::size_t>(cu[s] + i)]);
            double scale = 1.0 + std::abs(g);
            for (std::int64_t j = 0; j < size; ++j) {
              const auto b = static_cast<std::size_t>(members[static_cast<std::size_t>(cu[s] + j)]);
              const double q = z[b][at] - lse[b];
              const double by = c[matrix + static_cast<std::size_t>(i * size + j)];
              g += by * (std::exp(p) * (p - q) + std::exp(p) - std::exp(q));
              scale += by * (std::abs(p - q) + 1.0);
            }
            const double got = block[a * static_cast<std::size_t>(width) + static_cast<std::size_t>(v)];
            CHECK(std::abs(got - g) <= 1e-6 * scale);
          }
        }
        matrix += static_cast<std::size_t>(size * size);
      }
      first += width;
    }
    for (std::size_t e = 0; e < want.size(); ++e)
      CHECK(std::abs(kl[e] - want[e]) <= 1e-5 * (1.0 + want[e]));
  }
}
#endif

#if COMPACT_VECTORS
// A layer's rows of every size against double; all memory exactly its size.
void test_layers(int trials) {
  Random random(23);
  const auto filled = [&](std::int64_t size) { return normals(random, size, 2.0f); };
  const auto close = [](float found, double want, double size) {
    CHECK(std::abs(static_cast<double>(found) - want) <= 1e-6 * size + 1e-30);
  };
  for (int trial = 0; trial < trials; ++trial) {
    const std::int64_t n = 1 + below(random, trial % 8 ? 9 : 700), m = 2 * (1 + below(random, 70));
    const auto at = [&](const std::vector<float>& x, std::int64_t i, std::int64_t j) {
      return static_cast<double>(x[static_cast<std::size_t>(i * m + j)]);
    };
    const auto x = filled(n * m), y = filled(n * m), grad = filled(n * m), weight = filled(m);
    std::vector<std::vector<float>> first;
    for (int threads : {1, 3}) {
      std::vector<std::vector<float>> out(8, std::vector<float>(x.size()));
      std::vector<float> inverse(static_cast<std::size_t>(n));
      gated(x.data(), y.data(), out[0].data(), n * m, threads);
      gated_back(grad.data(), x.data(), y.data(), out[1].data(), out[2].data(), n * m, threads);
      norm(x.data(), weight.data(), 1e-5f, inverse.data(), out[3].data(), n, m, threads);
      norm_again(x.data(), weight.data(), inverse.data(), out[4].data(), n, m, threads);
      norm_back(grad.data(), x.data(), weight.data(), inverse.data(), nullptr, out[5].data(), n, m,
                threads);
      rotate(x.data(), y.data(), grad.data(), out[6].data(), n, 1, m, false, threads);
      rotate(x.data(), y.data(), grad.data(), out[7].data(), n, 1, m, true, threads);
      if (threads == 1) first = out;
      CHECK(out == first && out[3] == out[4]);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      double squares = 0.0, along = 0.0, size = 0.0;
      for (std::int64_t j = 0; j < m; ++j) {
        const double term = at(grad, i, j) * static_cast<double>(weight[j]) * at(x, i, j);
        squares += at(x, i, j) * at(x, i, j), along += term, size += std::abs(term);
      }
      const double by = 1.0 / std::sqrt(squares / static_cast<double>(m) + 1e-5);
      const double share = by * by * by / static_cast<double>(m);
      for (std::int64_t j = 0; j < m; ++j) {
        const double a = at(x, i, j), b = at(y, i, j), g = at(grad, i, j);
        const double w = static_cast<double>(weight[j]), s = 1.0 / (1.0 + std::exp(-a));
        const std::int64_t half = m / 2, k = j < half ? j + half : j - half;
        const double sign = j < half ? -1.0 : 1.0, other = at(x, i, k);
        close(first[0][i * m + j], a * s * b, std::abs(a * b));
        close(first[1][i * m + j], g * b * s * (1 + a * (1 - s)), std::abs(g * b) * (1 + std::abs(a)));
        close(first[2][i * m + j], g * a * s, std::abs(g * a));
        close(first[3][i * m + j], a * by * w, std::abs(a * by * w));
        close(first[5][i * m + j], g * w * by - a * along * share,
              std::abs(g * w * by) + std::abs(a) * size * share);
        close(first[6][i * m + j], a * b + sign * other * g, std::abs(a * b) + std::abs(other * g));
        close(first[7][i * m + j], a * b - sign * other * at(grad, i, k),
              std::abs(a * b) + std::abs(other * at(grad, i, k)));
      }
    }
  }
}
#endif

#if COMPACT_VECTORS && COMPACT_X86
// Products of every shape and order of both factors, against double; all memory exactly its size.
void test_products(int trials) {
  if (!can_multiply()) return;
  Random random(17);
  const auto filled = [&](std::int64_t size) { return normals(random, size, 1.0f); };
  const auto factor = [&](const std::vector<float>& x, std::int64_t rows, std::int64_t columns) {
    return below(random, 2) ? Factor{x.data(), columns, 1} : Factor{x.data(), 1, rows};
  };
  for (int trial = 0; trial < trials; ++trial) {
    const std::int64_t m = 1 + below(random, 90), n = 1 + below(random, 130),
                       k = 1 + below(random, trial % 8 ? 60 : 1000), stride = n + below(random, 3);
    const std::vector<float> x = filled(m * k), y = filled(k * n);
    const std::vector<float> before = filled((m - 1) * stride + n);
    const Factor a = factor(x, m, k), b = factor(y, k, n);
    const bool add = below(random, 2) != 0;
    std::vector<float> first;
    for (int threads : {1, 3}) {
      std::vector<float> c = before;
      multiply(a, b, c.data(), stride, m, n, k, add, threads);
      if (threads == 1) first = c;
      CHECK(c == first);  // the same bits however it is shared out
    }
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < stride && i * stride + j < (m - 1) * stride + n; ++j) {
        const auto at = static_cast<std::size_t>(i * stride + j);
        if (j >= n) {
          CHECK(first[at] == before[at]);
          continue;
        }
        double sum = add ? static_cast<double>(before[at]) : 0.0, size = std::abs(sum);
        for (std::int64_t t = 0; t < k; ++t) {
          const double term = static_cast<double>(a.data[i * a.row + t * a.column]) *
                              static_cast<double>(b.data[t * b.row + j * b.column]);
          sum += term, size += std::abs(term);
        }
        // every sum is one chain of k roundings at most
        CHECK(std::abs(static_cast<double>(first[at]) - sum) <=
              static_cast<double>(k + 1) * 6e-8 * size + 1e-30);
      }
  }
}
#endif

}  // namespace

int main(int argc, char** argv) {
  // core_tests [QUESTIONS [GRAPHS]]: random questions scored, random graphs checked by brute force
  const int questions = argc > 1 ? std::atoi(argv[1]) : 4000;
  const int graphs = argc > 2 ? std::atoi(argv[2]) : 4000;
  test_numbers();
  test_parse();
  test_assignment(graphs);
  test_matching(graphs);
  test_parallel();
#if COMPACT_VECTORS
  test_row_softmax();
  test_pairs();
  test_layers(std::min(graphs, 400));
#endif
#if COMPACT_VECTORS && COMPACT_X86
  test_products(std::min(graphs, 400));
#endif
  test_random_questions(questions);
  std::printf("%d checks passed\n", checks);
  return 0;
}
