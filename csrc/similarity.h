// How alike two steps are, in fixed point: integers in, integers out, so that every compiler, thread
// and implementation gives the same value.
#pragma once

#include <cstdint>
#include <vector>

#include "graph.h"

namespace compact {

constexpr std::int32_t kOne = 1 << 15;  // similarity 1.0

struct Options {
  // shares of the features in a step's similarity, any scale
  std::int32_t weight_result = 0, weight_numbers = 0, weight_operators = 0, weight_text = 0;
  std::int32_t weight_embedding = 0;
  // similarity at or below ramp_low counts as 0, at or above ramp_high as 1 (units of 1 / kOne)
  std::int32_t ramp_low = 0, ramp_high = kOne;
  // importance of a step: stating a result, mentioning numbers, words only (units of 1 / 256)
  std::int32_t step_stated = 256, step_numbers = 256, step_words = 256;
  // lambda * edge weight / 2, by edge type (units of 1 / 256)
  std::int32_t edge_half[kEdgeTypes] = {16, 32};
  // share of the final answer in the agreement (units of 1 / 1024)
  std::int32_t answer_share = 0;
  // share of a rationale's own soundness in its score (units of 1 / 1024)
  std::int32_t soundness = 0;
  // surface shingles' Jaccard at which two texts share a vote (units of 1 / 1024); 0 = never
  std::int32_t dedupe = 0;
  std::int32_t dedupe_min_shingles = 0;
  std::int64_t max_steps = 512;
  std::int64_t max_bytes = 1 << 22;
};

// Optional rows of int8, one a node of a StepGraphs, normalised to length 127.
struct Embeddings {
  const std::int8_t* rows = nullptr;
  std::int64_t width = 0;
};

// Fills out[i * (b1 - b0) + j] with the weighted similarity of nodes a0 + i of `a` and b0 + j of `b`.
void similarity(const StepGraphs& a, std::int64_t a0, std::int64_t a1, const StepGraphs& b,
                std::int64_t b0, std::int64_t b1, const Options& options, const Embeddings& ea,
                const Embeddings& eb, std::vector<std::int32_t>& out);

// The same for nodes [a0, a1) with themselves: the importance of each, unless its features have no
// weight.
void self_similarity(const StepGraphs& a, std::int64_t a0, std::int64_t a1, const Options& options,
                     bool embedded, std::vector<std::int32_t>& out);

}  // namespace compact
