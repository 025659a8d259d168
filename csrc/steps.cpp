#include "steps.h"

#include <algorithm>
#include <utility>

#include "text.h"

namespace compact {

void ResultTable::clear() {
  used_ = 0;
  if (++epoch_ != 0) return;
  std::fill(slots_.begin(), slots_.end(), Slot{0, 0, 0});  // epochs start anew
  epoch_ = 1;
}

// The slot that holds `key`, or the empty one where it belongs.
std::size_t ResultTable::place(std::int64_t key) const {
  const std::size_t last = slots_.size() - 1;
  std::size_t at = mix(static_cast<std::uint64_t>(key)) & last;
  while (slots_[at].epoch == epoch_ && slots_[at].key != key) at = (at + 1) & last;
  return at;
}

std::int32_t ResultTable::find(std::int64_t key) const {
  const Slot& slot = slots_[place(key)];
  return slot.epoch == epoch_ ? slot.step : -1;
}

void ResultTable::set(std::int64_t key, std::int32_t step) {
  std::size_t at = place(key);
  if (slots_[at].epoch != epoch_ && 2 * ++used_ > slots_.size()) {
    grow();
    at = place(key);
  }
  slots_[at] = {key, step, epoch_};
}

void ResultTable::grow() {
  std::vector<Slot> old(2 * slots_.size(), Slot{0, 0, 0});
  old.swap(slots_);
  for (const Slot& slot : old)
    if (slot.epoch == epoch_) slots_[place(slot.key)] = slot;
}

void StepBuilder::Step::clear() {
  numbers.clear();
  if (has_words) words = Signature{};
  has_words = false;
  operators = 0;
  comma = word = false;
}

void StepBuilder::Step::take(Step& other) {
  numbers.insert(numbers.end(), other.numbers.begin(), other.numbers.end());
  if (other.has_words) {
    for (std::size_t w = 0; w < words.size(); ++w) words[w] |= other.words[w];
    has_words = true;
  }
  operators |= other.operators;
  other.clear();
}

void StepBuilder::start(StepGraphs& out, std::int64_t max_steps) {
  out_ = &out;
  first_node_ = out.nodes();
  max_steps_ = max_steps;
  too_long_ = false;
  results_.clear();
  reset();
}

void StepBuilder::reset() {
  step_.clear();
  tail_.clear();
  has_tail_ = has_equation_ = false;
  last_word_ = 0;
}

void StepBuilder::merge() {
  if (has_tail_) step_.take(tail_);
  has_tail_ = false;
}

// What looked like a result was the start of an expression, or a link of a chain.
void StepBuilder::retract() {
  if (has_equation_) step_.numbers.push_back(equation_);
  has_equation_ = false;
  merge();
}

void StepBuilder::number(std::int64_t key, bool after_equals) {
  if (after_equals) {
    retract();
    equation_ = key;
    has_equation_ = has_tail_ = true;
    tail_.clear();
  } else {
    (has_tail_ ? tail_ : step_).numbers.push_back(key);
  }
}

void StepBuilder::word(std::uint64_t hash) {
  Step& step = has_tail_ ? tail_ : step_;
  step.has_words = true;
  step.mark(hash);
  if (last_word_ != 0) step.mark(pair_hash(last_word_, hash));
  last_word_ = hash;
}

void StepBuilder::operation(std::uint8_t bit, bool binds) {
  if (binds && has_tail_ && tail_.numbers.empty()) retract();
  (has_tail_ ? tail_ : step_).operators |= bit;
}

void StepBuilder::equals() {
  if (!has_tail_ || !tail_.begins_equation()) return;
  has_tail_ = false;  // the tail begins the next step
  flush();
  step_.clear();
  has_equation_ = false;
  last_word_ = 0;
  std::swap(step_, tail_);
}

void StepBuilder::end_step() {
  flush();
  reset();
}

void StepBuilder::begin_answer() {
  if (has_equation_ || has_tail_) flush();
  reset();
}

void StepBuilder::flush() {
  merge();
  if (step_.numbers.empty() && !step_.has_words && !has_equation_) return;
  StepGraphs& g = *out_;
  const auto me = static_cast<std::int32_t>(g.nodes() - first_node_);
  if (me >= max_steps_) {
    too_long_ = true;
    return;
  }
  ResultKind kind = kNoResult;
  std::int64_t result = 0;
  if (has_equation_) {
    kind = kStatedResult;
    result = equation_;
  } else if (!step_.numbers.empty() && step_.operators == 0) {
    kind = kImpliedResult;
    result = step_.numbers.back();
  }
  auto& n = step_.numbers;
  std::sort(n.begin(), n.end());
  n.erase(std::unique(n.begin(), n.end()), n.end());
  if (kind == kImpliedResult) n.erase(std::find(n.begin(), n.end(), result));
  g.result.push_back(result);
  g.result_kind.push_back(kind);
  g.operators.push_back(step_.operators);
  g.signature.push_back(step_.words);
  g.numbers.insert(g.numbers.end(), n.begin(), n.end());
  g.cu_numbers.push_back(static_cast<std::int64_t>(g.numbers.size()));
  edges(me, n);
  if (kind != kNoResult) results_.set(result, me);
}

void StepBuilder::edges(std::int32_t me, const std::vector<std::int64_t>& operands) {
  StepGraphs& g = *out_;
  auto edge = [&](std::int32_t source, EdgeType type) {
    g.edge_source.push_back(source);
    g.edge_target.push_back(me);
    g.edge_type.push_back(type);
  };
  if (me > 0) edge(me - 1, kNext);
  sources_.clear();
  for (std::int64_t key : operands)
    if (const std::int32_t step = results_.find(key); step >= 0) sources_.push_back(step);
  std::sort(sources_.begin(), sources_.end());
  sources_.erase(std::unique(sources_.begin(), sources_.end()), sources_.end());
  for (std::int32_t source : sources_) edge(source, kUses);
}

}  // namespace compact
