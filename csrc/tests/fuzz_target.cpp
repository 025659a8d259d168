// What every input must satisfy, whatever its bytes: parser, matching, assignment and scores, each
// against itself the other way round. Called by libFuzzer, or by fuzz_driver.cpp.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "consensus.h"
#include "simd.h"

using namespace compact;

namespace {

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                             \
    }                                                                           \
  } while (0)

// Reads an input from its start; zeros behind its end.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}
  std::int64_t byte() { return at_ == end_ ? 0 : *at_++; }
  std::int64_t below(std::int64_t limit) {
    const std::int64_t high = byte();
    return (high << 8 | byte()) % limit;
  }
  bool empty() const { return at_ == end_; }
  std::string_view rest() const {
    return {reinterpret_cast<const char*>(at_), static_cast<std::size_t>(end_ - at_)};
  }

 private:
  const std::uint8_t *at_, *end_;
};

template <class T>
bool rises(const std::vector<T>& values, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin + 1; i < end; ++i)
    if (!(values[i - 1] < values[i])) return false;
  return true;
}

// The arrays of graph `a` hold what StepGraphs promises.
void check_graph(const StepGraphs& g, std::int64_t a) {
  const std::int64_t a0 = g.cu_nodes[a], a1 = g.cu_nodes[a + 1];
  CHECK(0 <= a0 && a0 <= a1 && a1 <= static_cast<std::int64_t>(g.nodes()));
  CHECK(rises(g.shingles, g.cu_shingles[a], g.cu_shingles[a + 1]));
  for (std::int64_t i = a0; i < a1; ++i) {
    CHECK(g.cu_numbers[i] <= g.cu_numbers[i + 1] && g.operators[i] < 16);
    CHECK(rises(g.numbers, g.cu_numbers[i], g.cu_numbers[i + 1]));
  }
  for (std::int64_t e = g.cu_edges[a]; e < g.cu_edges[a + 1]; ++e) {
    CHECK(0 <= g.edge_source[e] && g.edge_source[e] < g.edge_target[e]);
    CHECK(g.edge_target[e] < a1 - a0 && g.edge_type[e] < kEdgeTypes);
    CHECK(g.edge_type[e] != kNext || g.edge_source[e] + 1 == g.edge_target[e]);
  }
}

ConsensusOptions read_options(Bytes& in) {
  ConsensusOptions o;
  const auto weight = [&] { return static_cast<std::int32_t>(in.byte() * 4); };
  o.graph.weight_result = weight(), o.graph.weight_numbers = weight();
  o.graph.weight_operators = weight(), o.graph.weight_text = weight();
  o.graph.ramp_low = static_cast<std::int32_t>(in.byte() * 64);
  o.graph.ramp_high = o.graph.ramp_low + 1 + static_cast<std::int32_t>(in.byte() * 64);
  o.graph.edge_half[kNext] = static_cast<std::int32_t>(in.below(129));
  o.graph.edge_half[kUses] = static_cast<std::int32_t>(in.below(129));
  o.graph.answer_share = static_cast<std::int32_t>(in.below(1025));
  o.graph.soundness = static_cast<std::int32_t>(in.below(1025));
  o.graph.dedupe = static_cast<std::int32_t>(in.below(1025));
  o.graph.dedupe_min_shingles = static_cast<std::int32_t>(in.byte() % 16);
  o.graph.max_steps = 1 + in.byte() % 64;
  o.mode = static_cast<Mode>(in.byte() % 3);
  o.centrality = static_cast<Centrality>(in.byte() % 3);
  o.node_budget = in.below(500);
  o.cluster_at = in.below(257) << 16;
  return o;
}

struct Scored {
  std::vector<std::int64_t> agreement;
  std::vector<double> score;
  std::uint8_t flags = 0;
  std::int64_t bad = -1;
};

Scored score(const std::vector<std::string_view>& texts, const std::vector<std::string_view>& answers,
             const ConsensusOptions& o) {
  const auto k = static_cast<std::int64_t>(texts.size());
  Scored s;
  s.agreement.resize(static_cast<std::size_t>(k * k));
  s.score.resize(texts.size());
  std::vector<std::int32_t> group(texts.size());
  const std::vector<std::uint8_t> given(answers.size(), 1);
  ParseError error;
  score_questions(texts, {0, k}, answers, given, o, 1, {0, k * k}, s.agreement.data(),
                  s.score.data(), group.data(), &s.flags, error);
  s.bad = error.text;
  return s;
}

// Texts between bytes 0xFF, as one question: read, matched and scored.
void run_texts(Bytes& in) {
  const ConsensusOptions o = read_options(in);
  const bool with_answers = in.byte() % 2;
  std::vector<std::string_view> texts;
  for (std::string_view rest = in.rest(); texts.size() < 6;) {
    const std::size_t end = rest.find('\xFF');
    texts.push_back(rest.substr(0, end));
    if (end == rest.npos) break;
    rest.remove_prefix(end + 1);
  }
  Parser reused;
  reused.set_limit(o.graph.max_steps);
  StepGraphs all;
  std::int64_t first_bad = -1;
  for (std::size_t t = 0; t < texts.size(); ++t) {
    Parser fresh;
    fresh.set_limit(o.graph.max_steps);
    StepGraphs one;
    const bool good = reused.parse(texts[t], all);
    CHECK(fresh.parse(texts[t], one) == good);
    CHECK(static_cast<std::int64_t>(one.nodes()) <= o.graph.max_steps);
    if (!good) {
      if (first_bad < 0) first_bad = static_cast<std::int64_t>(t);
      continue;
    }
    check_graph(one, 0);
    const auto nodes = static_cast<std::int64_t>(one.nodes());
    const auto last = static_cast<std::int64_t>(all.size()) - 1;
    check_graph(all, last);
    CHECK(all.answer.back() == one.answer[0] && all.answer_kind.back() == one.answer_kind[0]);
    CHECK(all.cu_nodes[last + 1] - all.cu_nodes[last] == nodes);
    CHECK(std::equal(one.result.begin(), one.result.end(), all.result.end() - nodes));
    CHECK(std::equal(one.numbers.begin(), one.numbers.end(),
                     all.numbers.end() - static_cast<std::ptrdiff_t>(one.numbers.size())));
    CHECK(std::equal(one.signature.begin(), one.signature.end(), all.signature.end() - nodes));
    std::int64_t key = 0;
    fresh.answer_key(texts[t], key);
  }
  const std::vector<std::string_view> answers =
      with_answers ? texts : std::vector<std::string_view>{};
  const Scored s = score(texts, answers, o);
  CHECK(s.bad == first_bad);
  if (s.bad >= 0) return;
  const std::size_t k = texts.size();
  for (std::size_t i = 0; i < k; ++i) {
    CHECK(s.score[i] >= 0 && s.score[i] <= 1);
    CHECK(s.agreement[i * k + i] == kUnit);
    for (std::size_t j = 0; j < k; ++j) {
      CHECK(s.agreement[i * k + j] == s.agreement[j * k + i]);
      CHECK(s.agreement[i * k + j] >= 0 && s.agreement[i * k + j] <= kUnit);
    }
  }
  const std::vector<std::string_view> turned(texts.rbegin(), texts.rend());
  const Scored back = score(turned, with_answers ? turned : answers, o);
  CHECK(back.flags == s.flags && std::equal(s.score.begin(), s.score.end(), back.score.rbegin()));
}

struct Edges {
  std::vector<std::int32_t> source, target;
  std::vector<std::uint8_t> type;
  EdgeList list() const {
    return {source.data(), target.data(), type.data(), static_cast<std::int64_t>(source.size())};
  }
  static Edges read(Bytes& in, std::int64_t n) {
    Edges e;
    const std::int64_t rare = 1 + in.byte() % 8;
    for (std::int32_t i = 0; i < n; ++i)
      for (std::int32_t j = 0; j < n; ++j)
        for (std::uint8_t type = 0; type < kEdgeTypes; ++type)
          if (i != j && !in.empty() && in.byte() % rare == 0)
            e.source.push_back(i), e.target.push_back(j), e.type.push_back(type);
    return e;
  }
};

struct Matched {
  MatchOutcome out;
  std::vector<std::int32_t> columns;
};

// Any similarities and any edges: modes in order, both ways round, both instruction sets.
void run_matching(Bytes& in) {
  const std::int64_t n = in.byte() % 13, m = in.byte() % 13, top = 1 + in.below(kOne);
  const std::int32_t half[2] = {static_cast<std::int32_t>(in.below(129)),
                                static_cast<std::int32_t>(in.below(129))};
  const std::int64_t budget = in.below(300), zeros = in.byte();
  const Edges a = Edges::read(in, n), b = Edges::read(in, m);
  std::vector<std::int32_t> s(static_cast<std::size_t>(n * m)), turned(s.size());
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < m; ++j) {
      const bool none = in.byte() < zeros;
      s[i * m + j] = none ? 0 : static_cast<std::int32_t>(in.below(top + 1));
      turned[j * n + i] = s[i * m + j];
    }
  static thread_local Matcher matcher;
  const auto run = [&](Mode mode, bool back) {
    Matched r;
    r.columns.resize(static_cast<std::size_t>(back ? m : n));
    r.out = back ? matcher.match(mode, turned.data(), m, n, b.list(), a.list(), half, budget,
                                 r.columns.data())
                 : matcher.match(mode, s.data(), n, m, a.list(), b.list(), half, budget,
                                 r.columns.data());
    return r;
  };
  Neighbours na, nb;
  na.build(a.list(), n);
  nb.build(b.list(), m);
  const Problem p{s.data(), n, m, {half[0], half[1]}, &na, &nb};
  std::int64_t before = std::int64_t{1} << 62;
  for (Mode mode : {Mode::kRelaxed, Mode::kExact, Mode::kFast}) {
    const Matched x = run(mode, false), back = run(mode, true);
    force_simd_level(0);
    const Matched plain = run(mode, false);
    force_simd_level(-1);
    CHECK(x.out.value == back.out.value && x.out.bound == back.out.bound);
    CHECK(x.out.value == plain.out.value && x.columns == plain.columns);
    CHECK(0 <= x.out.value && x.out.value <= x.out.bound && x.out.value <= before);
    CHECK(!x.out.proven || x.out.value == x.out.bound);
    before = x.out.value;
    std::vector<std::uint8_t> taken(static_cast<std::size_t>(m), 0);
    for (std::int32_t j : x.columns) {
      CHECK(j >= -1 && j < m);
      if (j >= 0) CHECK(!taken[static_cast<std::size_t>(j)]++);
    }
    if (mode != Mode::kRelaxed) CHECK(p.objective(x.columns.data()) >> kShift == x.out.value);
  }
}

// Any weights: the value both ways round and with both instruction sets, made by the assignment.
void run_assignment(Bytes& in) {
  const std::int64_t n = in.byte() % 72, m = in.byte() % 72;
  const std::int64_t top = std::int64_t{1} << in.byte() % 31;
  std::vector<std::int32_t> w(static_cast<std::size_t>(n * m)), turned(w.size());
  std::uint64_t state = static_cast<std::uint64_t>(in.below(65536));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < m; ++j) {
      state = state * 6364136223846793005ull + 1442695040888963407ull +
              static_cast<std::uint64_t>(in.byte());
      w[i * m + j] = static_cast<std::int32_t>(static_cast<std::int64_t>(state >> 33) % top);
      turned[j * n + i] = w[i * m + j];
    }
  static thread_local Assignment lap;
  std::vector<std::int32_t> columns(static_cast<std::size_t>(n)), plain(columns.size());
  const std::int64_t value = lap.solve(w.data(), n, m, columns.data());
  CHECK(lap.solve(turned.data(), m, n) == value);
  force_simd_level(0);
  CHECK(lap.solve(w.data(), n, m, plain.data()) == value && plain == columns);
  force_simd_level(-1);
  std::vector<std::uint8_t> taken(static_cast<std::size_t>(m), 0);
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t j = columns[static_cast<std::size_t>(i)];
    if (j < 0) continue;
    CHECK(j < m && !taken[static_cast<std::size_t>(j)]++);
    sum += w[i * m + j];
  }
  CHECK(sum == value);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes in(data, size);
  switch (in.byte() % 4) {
    case 2: run_matching(in); break;
    case 3: run_assignment(in); break;
    default: run_texts(in); break;
  }
  return 0;
}
