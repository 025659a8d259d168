// From the step graphs of one question's rationales to their agreement and consensus scores.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "similarity.h"
#include "graph.h"
#include "matching.h"
#include "parse.h"

namespace compact {

constexpr std::int64_t kUnit = 1 << 24;  // agreement 1.0

// What a teacher gets from another: how much of the other's reasoning it covers, how far the two
// agree, or the first, but only from those it agrees with.
enum class Centrality : std::uint8_t { kCoverage = 0, kAgreement = 1, kCluster = 2 };

struct ConsensusOptions {
  Options graph;
  Mode mode = Mode::kRelaxed;
  Centrality centrality = Centrality::kCoverage;
  std::int64_t node_budget = 100000;
  // agreement from which two teachers belong to one cluster (units of 1 / kUnit)
  std::int64_t cluster_at = kUnit / 2;
};

enum Flag : std::uint8_t { kNoEvidence = 1, kUndecidable = 2 };

// Working memory of one thread.
class QuestionScorer {
 public:
  explicit QuestionScorer(const ConsensusOptions& options) : options_(options) {}

  // agreement[K * K] in [0, kUnit], score[K] in [0, 1], group[K] (the smallest index of k's surface
  // group) for graphs [g0, g1) of `g`. Returns Flags.
  std::uint8_t question(const StepGraphs& g, std::int64_t g0, std::int64_t g1, const Embeddings& e,
                        std::int64_t* agreement, double* score, std::int32_t* group);

  // In [0, kUnit]: half for a final answer that the text derives (the first step that has it as
  // result states it; an answer in words needs no derivation), half for results that are used:
  // 1 / (1 + computed results that are neither used by a step nor the answer).
  std::int64_t soundness(const StepGraphs& g, std::int64_t a);

  // Value of graph a matched with itself, and with b, in units of 1 / kOne.
  std::int64_t self_match(const StepGraphs& g, std::int64_t a, bool embedded);
  MatchOutcome match(const StepGraphs& g, std::int64_t a, std::int64_t b, const Embeddings& e,
                     std::int32_t* assigned);

 private:
  struct Pair {
    std::int64_t agreement;  // steps: 2 F(a, b) / (F(a, a) + F(b, b)); symmetric
    std::int64_t a_covers;   // steps: F(a, b) / F(b, b)
    std::int64_t b_covers;
  };
  // All in [0, kUnit], kUnit for equal graphs; the final answers join the steps with their share, and
  // decide alone where one of the two computes nothing: likeness of mere words says who writes alike.
  Pair compare(const StepGraphs& g, std::int64_t a, std::int64_t b, std::int64_t self_a,
               std::int64_t self_b, const Embeddings& e);
  std::uint8_t score_groups(const std::int64_t* agreement, std::int64_t k, const std::int32_t* group,
                            double* score);
  void surface_groups(const StepGraphs& g, std::int64_t g0, std::int64_t k, std::int32_t* group);

  const ConsensusOptions& options_;
  Matcher matcher_;
  std::vector<std::int32_t> similarity_;
  std::vector<std::int64_t> selves_, covers_, sound_, used_;
  std::vector<std::uint8_t> weight_;
};

struct ParseError {
  std::int64_t text = -1;  // index of the offending text, the first if several
  std::string reason;
};

// Parses texts[0..count) into parts of a few graphs, in order; Join puts them together. On failure
// `error.text` names the first bad text.
void parse_all(const std::vector<std::string_view>& texts, const Options& options, int threads,
               std::vector<StepGraphs>& parts, ParseError& error);

// The whole way for questions [0, Q): texts of question q are cu[q]..cu[q+1]-1. `answers` (may be
// empty) replaces the answers found in the texts: answer_given[s] says whether there is one.
// agreement is laid out question by question, K * K each, from cu_agreement[q].
void score_questions(const std::vector<std::string_view>& texts, const std::vector<std::int64_t>& cu,
                     const std::vector<std::string_view>& answers,
                     const std::vector<std::uint8_t>& answer_given, const ConsensusOptions& options,
                     int threads, const std::vector<std::int64_t>& cu_agreement,
                     std::int64_t* agreement, double* score, std::int32_t* group,
                     std::uint8_t* flags, ParseError& error);

}  // namespace compact
