"""From token statistics to scores and teacher weights, without leaving the device.

`sequence_scores`: one program a sequence sums its tokens, block by block, in float64:

    NLL = mean of -logp over labels        MI = sum_t M_t max(I_t - I_{t-1}, 0)

or, for pointwise information, the log-likelihood of the answer span minus its prior.

`teacher_weights`: one program a question turns its K teachers' scores into weights:

    z(v) = (v - mean) / (max(std, floor) + 1e-4)      over the finite teachers, unbiased std
    alpha = softmax((b_mi z(MI) + b_cons z(CONS) - b_nll z(NLL)) / tau)

after leaving out non-finite teachers and those whose consensus is below a share of the largest.

Each sum has one order, given by its sequence or question alone: no atomics, and nothing else in
the batch can change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, next_power_of_2

STD_FLOOR = tl.constexpr(1e-4)  # added to every standard deviation

Rule = Literal["softmax", "best", "shares"]
ConsensusRule = Literal["none", "given", "both"]


# slices of a batch's vectors start anywhere: their alignment must not compile anything anew
@triton.jit(do_not_specialize_on_alignment=["spans_ptr", "prior_ptr", "cu_seqlens_ptr"])
def sequence_scores_kernel(
    logp_ptr,  # [T] float32
    information_ptr,  # [T] float32
    logsumexp_ptr,  # [T] float32, taken from the information; or unused
    targets_ptr,  # [T] int64
    counted_ptr,  # [T] uint8
    thinking_ptr,  # [T] uint8
    spans_ptr,  # [S, 2] int64
    prior_ptr,  # [S] float32
    cu_seqlens_ptr,  # [S+1] int64
    mi_ptr,  # [S] float32
    nll_ptr,  # [S] float32
    thinking_weight,
    other_weight,
    GAIN: tl.constexpr,
    LOGPROB: tl.constexpr,
    SPANS: tl.constexpr,
    THINKING: tl.constexpr,
    LENGTH_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + s)
    end = tl.load(cu_seqlens_ptr + s + 1)
    lanes = tl.arange(0, BLOCK)
    nll = tl.zeros((BLOCK,), dtype=tl.float64)
    labels = tl.zeros((BLOCK,), dtype=tl.float64)
    gain_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    places = tl.zeros((BLOCK,), dtype=tl.float64)
    for t0 in range(start, end, BLOCK):
        t = t0 + lanes
        inside = t < end
        logp = tl.load(logp_ptr + t, mask=inside, other=0.0)
        label = tl.load(targets_ptr + t, mask=inside, other=-1) >= 0
        nll -= tl.where(label, logp, 0.0).to(tl.float64)
        labels += label.to(tl.float64)
        if GAIN:
            counted = tl.load(counted_ptr + t, mask=inside, other=0) != 0
            follows = inside & counted & (t > start)
            now = tl.load(information_ptr + t, mask=follows, other=0.0)
            before = tl.load(information_ptr + t - 1, mask=follows, other=0.0)
            if LOGPROB:
                now -= tl.load(logsumexp_ptr + t, mask=follows, other=0.0)
                before -= tl.load(logsumexp_ptr + t - 1, mask=follows, other=0.0)
            gain = now - before
            gain = tl.where(gain < 0, 0.0, gain)  # a NaN stays
            weight = tl.full((BLOCK,), 1.0, dtype=tl.float32) * other_weight
            if THINKING:
                thought = tl.load(thinking_ptr + t, mask=inside, other=0) != 0
                weight = tl.where(thought, thinking_weight, weight)
            gain_sum += tl.where(follows, weight * gain, 0.0).to(tl.float64)
            places += (inside & counted).to(tl.float64)
    # 0 / 0 is NaN: a sequence without labels has no difficulty, and gets weight 0
    tl.store(nll_ptr + s, (tl.sum(nll, 0) / tl.sum(labels, 0)).to(tl.float32))
    if GAIN:
        total = tl.sum(gain_sum, 0)
        if LENGTH_NORM:
            total = total / tl.maximum(tl.sum(places, 0), 1.0)
        tl.store(mi_ptr + s, total.to(tl.float32))
    elif SPANS:
        first = tl.load(spans_ptr + 2 * s)
        last = tl.load(spans_ptr + 2 * s + 1)
        stated = tl.zeros((BLOCK,), dtype=tl.float64)
        for t0 in range(first, last, BLOCK):
            t = t0 + lanes
            stated += tl.load(logp_ptr + t, mask=t < last, other=0.0).to(tl.float64)
        value = tl.sum(stated, 0) - tl.load(prior_ptr + s).to(tl.float64)
        tl.store(mi_ptr + s, tl.where(last > first, value, float("nan")).to(tl.float32))
    else:
        tl.store(mi_ptr + s, float("nan"))


@dataclass(frozen=True)
class Information:
    """What MI is made of: values and counted positions, or spans and priors, or nothing."""

    values: Tensor | None = None  # [T] float32; I_t at counted positions and those before them
    logsumexp: Tensor | None = None  # [T] float32; subtracted from the values
    counted: Tensor | None = None  # [T] bool
    thinking: Tensor | None = None  # [T] bool
    spans: Tensor | None = None  # [S, 2] int64
    prior: Tensor | None = None  # [S] float32
    thinking_weight: float = 1.0
    other_weight: float = 0.1
    length_norm: bool = False


def sequence_scores(
    logp: Tensor,  # [T] float32
    targets: Tensor,  # [T] int64
    cu_seqlens: Tensor,  # [S+1] int64; need not start at 0
    information: Information,
) -> tuple[Tensor, Tensor]:
    """(MI [S], NLL [S]) in float32. NaN where there is nothing to measure."""
    S = cu_seqlens.numel() - 1
    mi, nll = logp.new_empty(S), logp.new_empty(S)
    i = information
    gain = i.values is not None

    def given(value: Tensor | None) -> Tensor:
        return logp if value is None else value

    sequence_scores_kernel[(S,)](
        logp, given(i.values), given(i.logsumexp), targets, given(_bytes(i.counted)),
        given(_bytes(i.thinking)), given(i.spans), given(i.prior), cu_seqlens, mi, nll,
        i.thinking_weight, i.other_weight, GAIN=gain, LOGPROB=i.logsumexp is not None,
        SPANS=i.spans is not None and i.prior is not None, THINKING=i.thinking is not None,
        LENGTH_NORM=i.length_norm, BLOCK=512, num_warps=4, num_stages=1, **UNFUSED,
    )  # fmt: skip
    return mi, nll


def sequence_scores_ref(
    logp: Tensor, targets: Tensor, cu_seqlens: Tensor, information: Information
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, in float64."""
    i, mi, nll = information, [], []
    bounds = cu_seqlens.tolist()
    for s, (a, b) in enumerate(pairwise(bounds)):
        labels = targets[a:b] >= 0
        nll.append(-logp[a:b][labels].double().sum() / labels.sum())
        if i.values is not None and i.counted is not None:
            values = i.values[a:b].double()
            if i.logsumexp is not None:
                values = values - i.logsumexp[a:b].double()
            gain = (values[1:] - values[:-1]).clamp(min=0)
            weight = torch.full_like(gain, i.other_weight)
            if i.thinking is not None:
                weight[i.thinking[a:b][1:]] = i.thinking_weight
            total = (weight * gain)[i.counted[a:b][1:]].sum()
            mi.append(total / i.counted[a:b].sum().clamp(min=1) if i.length_norm else total)
        elif i.spans is not None and i.prior is not None:
            first, last = i.spans[s].tolist()
            value = logp[first:last].double().sum() - i.prior[s].double()
            mi.append(value if last > first else torch.full_like(value, torch.nan))
        else:
            mi.append(torch.full_like(nll[-1], torch.nan))
    return torch.stack(mi), torch.stack(nll)


@triton.jit
def _finite(v):
    return (v == v) & (tl.abs(v) != float("inf"))


@triton.jit
def _z_scores(v, use, floor):
    v = tl.where(use, v, 0.0)
    count = tl.sum(use.to(tl.float64), 0)
    mean = tl.sum(v, 0) / tl.maximum(count, 1.0)
    centred = tl.where(use, v - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / tl.maximum(count - 1.0, 1.0)
    return centred / (tl.maximum(tl.sqrt(variance), floor) + STD_FLOOR)


@triton.jit(
    do_not_specialize=["first_sequence"],
    do_not_specialize_on_alignment=[
        "consensus_ptr",
        "attention_ptr",
        "shares_ptr",
        "cu_teachers_ptr",
    ],
)
def teacher_weights_kernel(
    mi_ptr,  # [S] float32
    nll_ptr,  # [S] float32
    consensus_ptr,  # [S] any float; so are attention and shares
    attention_ptr,
    shares_ptr,
    cu_teachers_ptr,  # [Q+1] int64
    weights_ptr,  # [S] float32; so are score and cons_out
    score_ptr,
    cons_out_ptr,
    filtered_ptr,  # [S] uint8; so is nonfinite
    nonfinite_ptr,
    skipped_ptr,  # [Q] uint8
    first_sequence,  # cu_teachers counts from this sequence on
    # the method's choices are constants: as arguments they would be rounded to float32
    B_MI: tl.constexpr,
    B_CONSENSUS: tl.constexpr,
    B_DIFFICULTY: tl.constexpr,
    TAU: tl.constexpr,
    Z_FLOOR: tl.constexpr,
    FILTER_BELOW: tl.constexpr,
    MI_USED: tl.constexpr,
    CONSENSUS_USED: tl.constexpr,
    SCORED: tl.constexpr,
    CONSENSUS: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_teachers_ptr + q) - first_sequence
    end = tl.load(cu_teachers_ptr + q + 1) - first_sequence
    s = start + tl.arange(0, BLOCK_K)
    member = s < end
    zero = tl.zeros((BLOCK_K,), dtype=tl.float64)
    floor = zero + Z_FLOOR
    nll = tl.load(nll_ptr + s, mask=member, other=0.0).to(tl.float64)
    finite = member & _finite(nll)
    mi = zero
    if MI_USED:
        mi = tl.load(mi_ptr + s, mask=member, other=0.0).to(tl.float64)
        finite = finite & _finite(mi)
    cons = zero + 1.0
    filter_on = cons
    if CONSENSUS != "none":
        filter_on = tl.load(consensus_ptr + s, mask=member, other=0.0).to(tl.float64)
        cons = filter_on
    if CONSENSUS == "both":
        attention = tl.load(attention_ptr + s, mask=member, other=0.0).to(tl.float64)
        use = finite & _finite(cons) & _finite(attention)
        both = (_z_scores(cons, use, floor) + _z_scores(attention, use, floor)) / 2.0
        cons = tl.where(use, both, float("nan"))
    if CONSENSUS_USED:
        finite = finite & _finite(cons)

    score = zero
    if SCORED:
        if MI_USED:
            score += B_MI * _z_scores(mi, finite, floor)
        if CONSENSUS != "none" and B_CONSENSUS != 0:
            score += B_CONSENSUS * _z_scores(cons, finite, floor)
        score -= B_DIFFICULTY * _z_scores(nll, finite, floor)

    filtered = member & (zero > 0)
    if CONSENSUS != "none" and FILTER_BELOW > 0:
        top = tl.max(tl.where(finite, filter_on, float("-inf")), 0)
        limit = tl.where(top > 0, FILTER_BELOW * top, float("-inf"))
        filtered = finite & (filter_on < limit)
    allowed = finite & (filtered == 0)

    if RULE == "shares":
        raw = tl.load(shares_ptr + s, mask=member, other=0.0).to(tl.float64)
    else:
        best = tl.max(tl.where(allowed, score, float("-inf")), 0)
        if RULE == "best":
            raw = (score == best).to(tl.float64)
        else:
            raw = tl.exp(tl.where(allowed, (score - best) / TAU, 0.0))
    raw = tl.where(allowed, raw, 0.0)
    total = tl.sum(raw, 0)
    weights = tl.where(total > 0, raw / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(weights_ptr + s, weights.to(tl.float32), mask=member)
    tl.store(score_ptr + s, score.to(tl.float32), mask=member)
    tl.store(cons_out_ptr + s, cons.to(tl.float32), mask=member)
    tl.store(filtered_ptr + s, filtered.to(tl.uint8), mask=member)
    tl.store(nonfinite_ptr + s, (finite == 0).to(tl.uint8), mask=member)
    tl.store(skipped_ptr + q, (total == 0).to(tl.uint8))


@dataclass(frozen=True)
class WeightRule:
    """The configuration's part of the weights."""

    rule: Rule  # "shares": raw shares are given
    betas: tuple[float, float, float]  # MI, consensus, difficulty
    consensus: ConsensusRule
    mi_used: bool
    consensus_used: bool
    tau: float = 1.0
    z_floor: float = 0.0
    filter_below: float = 0.0  # 0: off


@dataclass(frozen=True)
class Weights:
    """Results for S teachers' rationales in Q questions."""

    weights: Tensor  # [S] float32
    score: Tensor  # [S] float32
    consensus: Tensor  # [S] float32
    filtered: Tensor  # [S] bool
    nonfinite: Tensor  # [S] bool
    skipped: Tensor  # [Q] bool


def teacher_weights(
    mi: Tensor,  # [S] float32
    nll: Tensor,  # [S] float32
    consensus: Tensor | None,  # [S] any float; needed unless rule.consensus is "none"
    attention: Tensor | None,  # [S] any float; needed by "both"
    shares: Tensor | None,  # [S] any float; needed by rule "shares"
    cu_teachers: Tensor,  # [Q+1] int64
    rule: WeightRule,
    *,
    most_teachers: int,  # of any question
    first_sequence: int = 0,  # the sequence that row 0 of the arguments belongs to
) -> Weights:
    """alpha of every teacher of every question, and why."""
    S, Q = nll.numel(), cu_teachers.numel() - 1
    new, flags = torch.empty_like, torch.bool
    out = Weights(
        new(nll), new(nll), new(nll), new(nll, dtype=flags), new(nll, dtype=flags),
        torch.empty(Q, dtype=flags, device=nll.device),
    )  # fmt: skip
    assert S > 0
    teacher_weights_kernel[(Q,)](
        mi, nll, nll if consensus is None else consensus, nll if attention is None else attention,
        nll if shares is None else shares, cu_teachers, out.weights, out.score, out.consensus,
        _bytes(out.filtered), _bytes(out.nonfinite), _bytes(out.skipped), first_sequence,
        B_MI=rule.betas[0], B_CONSENSUS=rule.betas[1], B_DIFFICULTY=rule.betas[2], TAU=rule.tau,
        Z_FLOOR=rule.z_floor, FILTER_BELOW=rule.filter_below, MI_USED=rule.mi_used,
        CONSENSUS_USED=rule.consensus_used, SCORED=rule.rule != "shares",
        CONSENSUS=rule.consensus, RULE=rule.rule,
        BLOCK_K=next_power_of_2(most_teachers), num_warps=1, num_stages=1, **UNFUSED,
    )  # fmt: skip
    return out


def teacher_weights_ref(
    mi: Tensor,
    nll: Tensor,
    consensus: Tensor | None,
    attention: Tensor | None,
    shares: Tensor | None,
    cu_teachers: Tensor,
    rule: WeightRule,
) -> Weights:
    """The same in plain torch, question by question, in float64."""
    ones = torch.ones_like(nll)
    columns = [ones if c is None else c for c in (consensus, attention, shares)]
    table = torch.stack([c.double() for c in (mi, nll, *columns)])
    found = [_question_ref(*table[:, a:b], rule=rule) for a, b in pairwise(cu_teachers.tolist())]
    weights, score, cons, filtered, nonfinite, skipped = zip(*found, strict=True)
    return Weights(
        *(torch.cat(column).float() for column in (weights, score, cons)),
        torch.cat(filtered), torch.cat(nonfinite), torch.stack(skipped),
    )  # fmt: skip


def _question_ref(
    mi: Tensor,  # [K]; so are all others
    nll: Tensor,
    graph: Tensor,
    attention: Tensor,
    shares: Tensor,
    *,
    rule: WeightRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def z(values: Tensor, use: Tensor) -> Tensor:
        kept = values[use]
        std = kept.std() if kept.numel() > 1 else kept.new_tensor(0.0)
        std = std.clamp(min=rule.z_floor)
        out = torch.zeros_like(values)
        out[use] = (kept - kept.mean()) / (std + STD_FLOOR.value)
        return out

    finite = nll.isfinite()
    if rule.mi_used:
        finite &= mi.isfinite()
    cons = graph
    if rule.consensus == "both":
        use = finite & graph.isfinite() & attention.isfinite()
        cons = torch.where(use, (z(graph, use) + z(attention, use)) / 2, torch.nan)
    if rule.consensus_used:
        finite = finite & cons.isfinite()
    score = torch.zeros_like(nll)
    if rule.rule != "shares":
        terms = ((mi, rule.mi_used), (cons, rule.consensus != "none"), (nll, True))
        signs = (rule.betas[0], rule.betas[1], -rule.betas[2])
        for beta, (values, used) in zip(signs, terms, strict=True):
            if used and beta != 0:
                score = score + beta * z(values, finite)
    filtered = torch.zeros_like(finite)
    if rule.consensus != "none" and rule.filter_below > 0 and bool(finite.any()):
        top = graph[finite].max()
        filtered = finite & (top > 0) & (graph < rule.filter_below * top)
    allowed = finite & ~filtered
    raw = torch.zeros_like(nll)
    if rule.rule == "shares":
        raw[allowed] = shares[allowed]
    elif rule.rule == "best":
        top = score[allowed].amax() if allowed.any() else score.new_tensor(0.0)
        raw[allowed] = (score[allowed] == top).double()
    else:
        raw[allowed] = torch.softmax(score[allowed] / rule.tau, 0)
    total = raw.sum()
    weights = raw / total if total > 0 else raw
    return weights, score, cons, filtered, ~finite, total == 0


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)
