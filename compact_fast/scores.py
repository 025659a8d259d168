"""From per-token statistics to scores and teacher weights: the part of the method that works on
[T] and [S] vectors. Shared by every backend, so that they can only differ in the statistics.

Sums run in float64 in the order of the positions: a question's scores have the same bits whatever
else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout

STD_FLOOR = 1e-4  # added to every standard deviation; the authors' value


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is measured in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_sum(values: Tensor, layout: TokenLayout) -> Tensor:
    """Sum of each sequence's tokens. values [T] -> [S], summed in float64, differentiable."""
    wide = values.double()
    if values.is_cuda:  # index_add_ uses atomics there: not repeatable
        return torch.segment_reduce(wide, "sum", lengths=layout.sequence_lengths)
    return wide.new_zeros(layout.num_sequences).index_add(0, layout.token_sequence, wide)


def difficulty(token_logp: Tensor, layout: TokenLayout) -> Tensor:
    """S_NLL: mean negative log-likelihood over a sequence's labelled tokens, in nats.

    token_logp [T], 0 where there is no label -> [S] (NaN for a sequence without labels).
    """
    return (-segment_sum(token_logp, layout) / layout.label_counts).to(token_logp.dtype)


def adaptability(information: Tensor, layout: TokenLayout, config: CompactConfig) -> Tensor:
    """S_MI = sum_t M_t max(I_t - I_{t-1}, 0) over the counted positions.

    information [T]: I_t at counted positions and the ones before them, anything elsewhere -> [S].
    """
    counted = counted_positions(layout, config)
    gain = information - torch.roll(information, 1)
    # torch.where, not a product: a NaN at a position that does not count must not count
    gain = torch.where(layout.token_index > 0, gain, 0.0).clamp(min=0)
    thinking = layout.thinking if layout.thinking is not None else torch.zeros_like(counted)
    gain = torch.where(thinking, gain * config.thinking_weight, gain * config.other_weight)
    total = segment_sum(torch.where(counted, gain, 0.0), layout)
    if config.mi_length_norm:
        total = total / segment_sum(counted.double(), layout).clamp(min=1)
    return total.to(information.dtype)


def counted_positions(layout: TokenLayout, config: CompactConfig) -> Tensor:
    """[T] bool: the positions whose gain enters S_MI."""
    if config.mi_positions == "all":
        return torch.ones_like(layout.labelled)
    return layout.assistant_mask


def information_positions(layout: TokenLayout, config: CompactConfig) -> Tensor:
    """[T] bool: the positions where I_t is needed, the counted ones and those just before."""
    counted = counted_positions(layout, config) & (layout.token_index > 0)
    return counted | torch.roll(counted, -1)


def pointwise_information(token_logp: Tensor, layout: TokenLayout) -> Tensor:
    """mi="pvi": log p(gold | question, rationale) - log p(gold | question), in nats, [S].

    The first term is read off where the rationale states the gold answer. A rationale that never
    states it has no such term: NaN, which gives it weight 0.
    """
    assert layout.prior_logp is not None
    inside = span_mask(layout)
    stated = segment_sum(torch.where(inside, token_logp, 0.0), layout)
    has_span = segment_sum(inside.double(), layout) > 0
    value = stated - layout.prior_logp.double()[layout.sequence_question]
    return torch.where(has_span, value, torch.nan).to(token_logp.dtype)


def span_mask(layout: TokenLayout) -> Tensor:
    """[T] bool: positions inside an answer span."""
    if layout.answer_spans is None:
        return torch.zeros_like(layout.labelled)
    at = torch.arange(layout.num_tokens, device=layout.device)
    start, end = layout.answer_spans[layout.token_sequence].unbind(1)
    return (at >= start) & (at < end)


class TeacherGroups:
    """Sums and maxima over the teachers of each question, in a fixed order.

    Columns are added one by one: the bits do not depend on how many teachers other questions have.
    """

    def __init__(self, cu_teachers: Tensor) -> None:
        counts = cu_teachers.diff()
        self.num_questions = counts.numel()
        self.num_sequences = S = int(cu_teachers[-1])
        self.question = torch.repeat_interleave(  # [S]
            torch.arange(self.num_questions, device=counts.device), counts, output_size=S
        )
        self.place = torch.arange(S, device=counts.device) - cu_teachers[:-1][self.question]  # [S]
        self.widest = int(counts.max()) if counts.numel() else 0

    def _columns(self, values: Tensor, fill: float) -> tuple[Tensor, ...]:
        table = values.new_full((self.num_questions, self.widest), fill)
        table[self.question, self.place] = values
        return table.unbind(1)

    def sum(self, values: Tensor) -> Tensor:  # [S] -> [Q]
        total = values.new_zeros(self.num_questions)
        for column in self._columns(values, 0.0):
            total = total + column
        return total

    def max(self, values: Tensor) -> Tensor:  # [S] -> [Q]; -inf for no value
        top = values.new_full((self.num_questions,), -torch.inf)
        for column in self._columns(values, -torch.inf):
            top = torch.maximum(top, column)
        return top

    def z_scores(self, values: Tensor, use: Tensor, floor: float) -> Tensor:
        """(v - mean) / (std + 1e-4) over the teachers in `use`, unbiased std; 0 for the others."""
        v = torch.where(use, values, 0.0)
        count = self.sum(use.to(v.dtype))
        mean = self.sum(v) / count.clamp(min=1)
        centred = torch.where(use, v - mean[self.question], 0.0)
        std = (self.sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        return centred / (std.clamp(min=floor) + STD_FLOOR)[self.question]


@dataclass(frozen=True)
class TeacherWeights:
    """Weights of S teachers' rationales in Q questions."""

    weights: Tensor  # [S] float; sums to 1 in each question that is not skipped
    score: Tensor  # [S] float; what the softmax saw, before the temperature
    consensus: Tensor  # [S] float; S_cons
    filtered: Tensor  # [S] bool; left out for low consensus
    nonfinite: Tensor  # [S] bool; left out because a score was not finite
    skipped: Tensor  # [Q] bool; no teacher left


def layout_weights(
    mi: Tensor,  # [S]
    nll: Tensor,  # [S]
    consensus: Tensor | None,  # [S]
    attention: Tensor | None,  # [S]
    layout: TokenLayout,
    config: CompactConfig,
    questions: slice | None = None,
) -> TeacherWeights:
    """`teacher_weights` of a layout, or of some of its questions: [S] are then their sequences."""
    q = questions or slice(0, layout.num_questions)
    cu_teachers = layout.cu_teachers[q.start : q.stop + 1]
    s = slice(*cu_teachers[[0, -1]].tolist())
    return teacher_weights(
        mi,
        nll,
        consensus,
        attention,
        cu_teachers - s.start,
        config,
        teachers=layout.teachers[s],
        question_ids=None if layout.question_ids is None else layout.question_ids[q],
        correct=None if layout.correct is None else layout.correct[s],
    )


@torch.no_grad()
def teacher_weights(
    mi: Tensor,  # [S]
    nll: Tensor,  # [S]
    consensus: Tensor | None,  # [S]
    attention: Tensor | None,  # [S]
    cu_teachers: Tensor,  # [Q+1]
    config: CompactConfig,
    *,
    teachers: Tensor | None = None,  # [S]; see TokenLayout.teachers
    question_ids: Tensor | None = None,  # [Q]
    correct: Tensor | None = None,  # [S]
) -> TeacherWeights:
    """alpha of METHOD section 4, with filter, non-finite handling and the named baselines.

    Computed in float64 and returned in the dtype of `nll`.
    """
    groups = TeacherGroups(cu_teachers)
    mi64, nll64 = mi.double(), nll.double()
    b_mi, b_consensus, b_difficulty = config.betas
    scored = config.scored
    mi_used = scored and b_mi != 0
    consensus_used = (scored and b_consensus != 0) or config.filter_below > 0

    finite = torch.isfinite(nll64)
    if mi_used:
        finite = finite & torch.isfinite(mi64)
    cons64, filter_on = _consensus_score(groups, consensus, attention, finite, config)
    if consensus_used:
        finite = finite & torch.isfinite(cons64)

    score = torch.zeros_like(nll64)
    if scored:
        for beta, values in ((b_mi, mi64), (b_consensus, cons64), (-b_difficulty, nll64)):
            if beta != 0:
                score = score + beta * groups.z_scores(values, finite, config.z_floor)

    filtered = torch.zeros_like(finite)
    if config.filter_below > 0 and filter_on is not None:
        top = groups.max(torch.where(finite, filter_on, -torch.inf))[groups.question]
        filtered = finite & (top > 0) & (filter_on < config.filter_below * top)
    allowed = finite & ~filtered

    weights = _share(groups, score, allowed, config, teachers, question_ids, correct)
    return TeacherWeights(
        weights=weights.to(nll.dtype),
        score=score.to(nll.dtype),
        consensus=cons64.to(nll.dtype, copy=True),
        filtered=filtered,
        nonfinite=~finite,
        skipped=groups.sum(weights) == 0,
    )


def _consensus_score(
    groups: TeacherGroups,
    consensus: Tensor | None,
    attention: Tensor | None,
    finite: Tensor,
    config: CompactConfig,
) -> tuple[Tensor, Tensor | None]:
    """S_cons [S] and the raw, non-negative scores that the filter compares (or None)."""
    none = finite.new_ones(finite.shape, dtype=torch.float64)
    graph = None if consensus is None else consensus.double()
    by_attention = None if attention is None else attention.double()
    if config.consensus == "none":
        return none, None
    if config.consensus == "attention":
        assert by_attention is not None
        return by_attention, by_attention
    if config.consensus == "graph":
        return (none, None) if graph is None else (graph, graph)
    assert graph is not None
    assert by_attention is not None
    use = finite & torch.isfinite(graph) & torch.isfinite(by_attention)
    z = [groups.z_scores(v, use, config.z_floor) for v in (graph, by_attention)]
    return torch.where(use, (z[0] + z[1]) / 2, torch.nan), graph


def _share(
    groups: TeacherGroups,
    score: Tensor,
    allowed: Tensor,
    config: CompactConfig,
    teachers: Tensor | None,
    question_ids: Tensor | None,
    correct: Tensor | None,
) -> Tensor:
    """Raw shares by the weighting's rule, normalised to sum to 1 in each question."""
    weighting = config.weighting
    if not isinstance(weighting, str):
        assert teachers is not None
        raw = score.new_tensor(weighting)[teachers]
    elif weighting == "uniform":
        raw = torch.ones_like(score)
    elif weighting == "correct":
        assert correct is not None
        raw = (correct == 1).to(score.dtype)
    elif weighting == "random":
        assert teachers is not None
        assert question_ids is not None
        raw = _exponential_by_key(config.seed, question_ids[groups.question], teachers)
    else:
        top = groups.max(torch.where(allowed, score, -torch.inf))[groups.question]
        if weighting == "best":
            raw = (score == top).to(score.dtype)
        else:
            raw = torch.exp((score - top) / config.tau)
    raw = torch.where(allowed, raw, 0.0)
    total = groups.sum(raw)[groups.question]
    return torch.where(total > 0, raw / total, 0.0)


def _exponential_by_key(seed: int, question: Tensor, teacher: Tensor) -> Tensor:
    """Exponential variates that depend on (seed, question, teacher) alone.

    Normalised they are uniform on the simplex, whatever the order of teachers or questions.
    The mixing is MurmurHash3's 32-bit finaliser, in int64 so that products cannot overflow.
    """
    mask = 0xFFFFFFFF
    state = torch.full_like(question, (seed * 0x9E3779B1 + 1) & mask)
    for part in (question, teacher):
        state = state ^ ((part * 0x85EBCA6B + 0x165667B1) & mask)
        for shift, factor in ((16, 0x85EB), (13, 0xC2B3), (16, 0x9E37)):
            state = state ^ (state >> shift)
            state = (state * (2 * factor + 1)) & mask
        state = state ^ (state >> 15)
    uniform = (state.double() + 0.5) / 2**32
    return -torch.log(uniform)
