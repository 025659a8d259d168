#include "consensus.h"

#include <algorithm>
#include <memory>
#include <mutex>

#include "numbers.h"
#include "parallel.h"

namespace compact {

namespace {

EdgeList edges_of(const StepGraphs& g, std::int64_t a) {
  const auto begin = g.cu_edges[a];
  return {g.edge_source.data() + begin, g.edge_target.data() + begin, g.edge_type.data() + begin,
          g.cu_edges[a + 1] - begin};
}

std::string limit_text(const char* what, std::int64_t have, std::int64_t limit) {
  return std::string(what) + (have > 0 ? " (" + std::to_string(have) + ")" : std::string()) +
         "; the limit is " + std::to_string(limit);
}

// Does any step of the graph state a result?
bool computes(const StepGraphs& g, std::int64_t a) {
  const auto begin = g.result_kind.begin() + g.cu_nodes[a];
  const auto end = g.result_kind.begin() + g.cu_nodes[a + 1];
  return std::find(begin, end, kStatedResult) != end;
}

// Two texts make one claim only if they come to the same answer, or both to none.
bool same_answer(const StepGraphs& g, std::int64_t a, std::int64_t b) {
  const bool has_a = g.answer_kind[a] != kNoAnswer, has_b = g.answer_kind[b] != kNoAnswer;
  return has_a == has_b && (!has_a || g.answer[a] == g.answer[b]);
}

bool parse_one(Parser& parser, std::string_view text, std::int64_t index, const Options& options,
               StepGraphs& out, ParseError& error) {
  std::string reason;
  if (static_cast<std::int64_t>(text.size()) > options.max_bytes)
    reason = limit_text("too many bytes", static_cast<std::int64_t>(text.size()), options.max_bytes);
  else if (!parser.parse(text, out))
    reason = limit_text("too many steps", 0, options.max_steps);
  else
    return true;
  if (error.text < 0 || index < error.text) error = {index, reason};
  return false;
}

}  // namespace

MatchOutcome QuestionScorer::match(const StepGraphs& g, std::int64_t a, std::int64_t b,
                                   const Embeddings& e, std::int32_t* assigned) {
  const std::int64_t a0 = g.cu_nodes[a], a1 = g.cu_nodes[a + 1];
  const std::int64_t b0 = g.cu_nodes[b], b1 = g.cu_nodes[b + 1];
  similarity(g, a0, a1, g, b0, b1, options_.graph, e, e, similarity_);
  return matcher_.match(options_.mode, similarity_.data(), a1 - a0, b1 - b0, edges_of(g, a),
                        edges_of(g, b), options_.graph.edge_half, options_.node_budget, assigned);
}

std::int64_t QuestionScorer::self_match(const StepGraphs& g, std::int64_t a, bool embedded) {
  const std::int64_t a0 = g.cu_nodes[a], a1 = g.cu_nodes[a + 1];
  self_similarity(g, a0, a1, options_.graph, embedded, similarity_);
  return self_value(options_.mode, similarity_.data(), a1 - a0, edges_of(g, a),
                    options_.graph.edge_half);
}

QuestionScorer::Pair QuestionScorer::compare(const StepGraphs& g, std::int64_t a, std::int64_t b,
                                             std::int64_t self_a, std::int64_t self_b,
                                             const Embeddings& e) {
  Pair pair{0, 0, 0};
  if (self_a > 0 && self_b > 0) {
    const std::int64_t value = match(g, a, b, e, nullptr).value;
    pair.agreement = std::min(kUnit, 2 * value * kUnit / (self_a + self_b));
    pair.a_covers = std::min(kUnit, value * kUnit / self_b);
    pair.b_covers = std::min(kUnit, value * kUnit / self_a);
  }
  const bool has_a = g.answer_kind[a] != kNoAnswer, has_b = g.answer_kind[b] != kNoAnswer;
  std::int64_t share = options_.graph.answer_share;
  if (share == 0 || (!has_a && !has_b)) return pair;
  if (!computes(g, a) || !computes(g, b)) share = 1024;
  const std::int64_t same = has_a && has_b && g.answer[a] == g.answer[b] ? kUnit : 0;
  for (std::int64_t* part : {&pair.agreement, &pair.a_covers, &pair.b_covers})
    *part = ((1024 - share) * *part + share * same) / 1024;
  return pair;
}

std::int64_t QuestionScorer::soundness(const StepGraphs& g, std::int64_t a) {
  const std::int64_t a0 = g.cu_nodes[a], a1 = g.cu_nodes[a + 1];
  const bool has = g.answer_kind[a] != kNoAnswer;
  const std::int64_t answer = g.answer[a];
  used_.assign(g.numbers.begin() + g.cu_numbers[a0], g.numbers.begin() + g.cu_numbers[a1]);
  std::sort(used_.begin(), used_.end());
  std::int64_t loose = 0;
  bool derived = has && (answer >= kHuge), found = false;
  for (std::int64_t i = a0; i < a1; ++i) {
    if (g.result_kind[i] == kNoResult) continue;
    const bool is_answer = has && g.result[i] == answer, stated = g.result_kind[i] == kStatedResult;
    if (is_answer && !found) {
      found = true;
      derived = derived || stated;
    }
    if (stated && g.operators[i] && !is_answer &&
        !std::binary_search(used_.begin(), used_.end(), g.result[i]))
      ++loose;
  }
  return ((derived ? kUnit : 0) + kUnit / (1 + loose)) / 2;
}

// Teachers whose surface texts are near-identical and come to one answer, closed under transitivity.
// group[k] is the smallest index of k's group. Very short texts are never copies of each other: honest answers of a
// few words look alike.
void QuestionScorer::surface_groups(const StepGraphs& g, std::int64_t g0, std::int64_t k,
                                    std::int32_t* group) {
  for (std::int64_t i = 0; i < k; ++i) group[i] = static_cast<std::int32_t>(i);
  const Options& o = options_.graph;
  if (o.dedupe <= 0) return;
  for (std::int64_t i = 0; i < k; ++i) {
    const std::uint64_t *a = g.shingles.data() + g.cu_shingles[g0 + i],
                        *a_end = g.shingles.data() + g.cu_shingles[g0 + i + 1];
    if (a_end - a < o.dedupe_min_shingles) continue;
    for (std::int64_t j = i + 1; j < k; ++j) {
      const std::uint64_t *b = g.shingles.data() + g.cu_shingles[g0 + j],
                          *b_end = g.shingles.data() + g.cu_shingles[g0 + j + 1];
      const std::int64_t n = a_end - a, m = b_end - b;
      if (m < o.dedupe_min_shingles || !same_answer(g, g0 + i, g0 + j)) continue;
      if (1024 * std::min(n, m) < o.dedupe * std::max(n, m)) continue;
      std::int64_t common = 0;
      for (const std::uint64_t *x = a, *y = b; x != a_end && y != b_end;) {
        if (*x == *y)
          ++common, ++x, ++y;
        else if (*x < *y)
          ++x;
        else
          ++y;
      }
      if (1024 * common < o.dedupe * (n + m - common)) continue;
      const std::int32_t keep = std::min(group[i], group[j]), drop = std::max(group[i], group[j]);
      for (std::int64_t t = 0; t < k; ++t)
        if (group[t] == drop) group[t] = keep;
    }
  }
}

std::uint8_t QuestionScorer::question(const StepGraphs& g, std::int64_t g0, std::int64_t g1,
                                      const Embeddings& e, std::int64_t* r, double* score,
                                      std::int32_t* group) {
  const std::int64_t k = g1 - g0;
  selves_.resize(static_cast<std::size_t>(k));
  sound_.resize(static_cast<std::size_t>(k));
  covers_.assign(static_cast<std::size_t>(k * k), kUnit);
  for (std::int64_t i = 0; i < k; ++i) {
    selves_[i] = self_match(g, g0 + i, e.rows != nullptr);
    sound_[i] = soundness(g, g0 + i);
  }
  for (std::int64_t i = 0; i < k; ++i) {
    r[i * k + i] = kUnit;
    for (std::int64_t j = i + 1; j < k; ++j) {
      const Pair pair = compare(g, g0 + i, g0 + j, selves_[i], selves_[j], e);
      r[i * k + j] = r[j * k + i] = pair.agreement;
      covers_[i * k + j] = pair.a_covers;
      covers_[j * k + i] = pair.b_covers;
    }
  }
  surface_groups(g, g0, k, group);
  return score_groups(r, k, group, score);
}

std::uint8_t QuestionScorer::score_groups(const std::int64_t* r, std::int64_t k,
                                          const std::int32_t* group, double* score) {
  std::int64_t groups = 0;
  for (std::int64_t i = 0; i < k; ++i) groups += group[i] == i;
  if (groups <= 1) {
    std::fill(score, score + k, 1.0);
    return kNoEvidence;
  }
  const auto same_covers = [&](std::int64_t i, std::int64_t j) {
    for (std::int64_t t = 0; t < k; ++t)
      if (covers_[i * k + t] != covers_[j * k + t] || covers_[t * k + i] != covers_[t * k + j])
        return false;
    return true;
  };
  // exact copies inside a group count once, so that one more of them changes nothing
  weight_.assign(static_cast<std::size_t>(k), 1);
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = 0; j < i; ++j)
      if (group[i] == group[j] && r[i * k + j] == kUnit &&
          std::equal(r + i * k, r + (i + 1) * k, r + j * k) && same_covers(i, j) &&
          sound_[i] == sound_[j])
        weight_[i] = 0;
  // mean over the voting members of group `lead` of what teacher i gets from them
  auto mean = [&](const std::int64_t* from, std::int64_t i, std::int64_t lead) {
    std::int64_t sum = 0, members = 0;
    for (std::int64_t j = 0; j < k; ++j) {
      if (group[j] != lead || !weight_[j]) continue;
      sum += from[i * k + j];
      ++members;
    }
    return sum / members;
  };
  if (groups == 2) {  // nobody can tell who is right: all the same
    std::int64_t sum = 0, pairs = 0;  // over all pairs at once: rounding knows no first group
    for (std::int64_t i = 0; i < k; ++i) {
      for (std::int64_t j = i + 1; j < k; ++j) {
        if (group[i] == group[j] || !weight_[i] || !weight_[j]) continue;
        sum += r[i * k + j];
        ++pairs;
      }
    }
    std::fill(score, score + k, static_cast<double>(sum / pairs) / static_cast<double>(kUnit));
    return kUndecidable;
  }
  const std::int64_t share = options_.graph.soundness;
  for (std::int64_t i = 0; i < k; ++i) {
    std::int64_t sum = 0;
    for (std::int64_t lead = 0; lead < k; ++lead) {
      if (group[lead] != lead || group[i] == lead) continue;
      const std::int64_t agrees = mean(r, i, lead);
      if (options_.centrality == Centrality::kCluster && agrees < options_.cluster_at) continue;
      sum += options_.centrality == Centrality::kAgreement ? agrees : mean(covers_.data(), i, lead);
    }
    const std::int64_t others = groups - 1;
    score[i] = static_cast<double>((1024 - share) * sum + share * others * sound_[i]) /
               static_cast<double>(1024 * others * kUnit);
  }
  return 0;
}

void parse_all(const std::vector<std::string_view>& texts, const Options& options, int threads,
               std::vector<StepGraphs>& parts, ParseError& error) {
  constexpr std::int64_t chunk = 64;
  const auto count = static_cast<std::int64_t>(texts.size());
  parts.resize(static_cast<std::size_t>((count + chunk - 1) / chunk));
  std::mutex guard;
  parallel_for(count, chunk, threads, [&](std::int64_t begin, std::int64_t end, int) {
    thread_local std::unique_ptr<Parser> parser;
    thread_local StepGraphs graphs;  // grows once; what is kept is copied to its size
    if (!parser) parser = std::make_unique<Parser>();
    parser->set_limit(options.max_steps);
    graphs.clear();
    ParseError mine;
    for (std::int64_t s = begin; s < end; ++s)
      if (!parse_one(*parser, texts[s], s, options, graphs, mine)) break;
    parts[static_cast<std::size_t>(begin / chunk)] = graphs;
    if (mine.text >= 0) {
      std::lock_guard<std::mutex> lock(guard);
      if (error.text < 0 || mine.text < error.text) error = mine;
    }
  });
}

void score_questions(const std::vector<std::string_view>& texts, const std::vector<std::int64_t>& cu,
                     const std::vector<std::string_view>& answers,
                     const std::vector<std::uint8_t>& answer_given, const ConsensusOptions& options,
                     int threads, const std::vector<std::int64_t>& cu_agreement,
                     std::int64_t* agreement, double* score, std::int32_t* group,
                     std::uint8_t* flags, ParseError& error) {
  const auto questions = static_cast<std::int64_t>(cu.size()) - 1;
  std::mutex guard;
  parallel_for(questions, 16, threads, [&](std::int64_t begin, std::int64_t end, int) {
    Parser parser;
    parser.set_limit(options.graph.max_steps);
    QuestionScorer scorer(options);
    StepGraphs graphs;
    ParseError mine;
    for (std::int64_t q = begin; q < end; ++q) {
      graphs.clear();
      bool good = true;
      for (std::int64_t s = cu[q]; s < cu[q + 1] && good; ++s) {
        good = parse_one(parser, texts[s], s, options.graph, graphs, mine);
        if (!good || answers.empty()) continue;
        std::int64_t key = 0;
        const bool given = answer_given[s] && parser.answer_key(answers[s], key);
        graphs.answer.back() = given ? key : 0;
        graphs.answer_kind.back() = given ? kExplicitAnswer : kNoAnswer;
      }
      if (!good) break;
      flags[q] = scorer.question(graphs, 0, cu[q + 1] - cu[q], {}, agreement + cu_agreement[q],
                                 score + cu[q], group + cu[q]);
    }
    if (mine.text >= 0) {
      std::lock_guard<std::mutex> lock(guard);
      if (error.text < 0 || mine.text < error.text) error = mine;
    }
  });
}

}  // namespace compact
