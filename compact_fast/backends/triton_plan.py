"""What the host decides before a step on a GPU, from a layout on the CPU.

Everything that depends on values measured in the step stays on the device; everything here depends
on the layout and the configuration alone. It reaches the device in one copy that the host does not
wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import consistency_spans
from compact_fast.scores import _exponential_by_key, counted_positions, information_positions
from compact_fast.transfer import send
from compact_fast.triton_kernels.teacher_weights import ConsensusRule, Information, Rule, WeightRule


@dataclass(frozen=True)
class Group:
    """Consecutive whole questions, and their rows among all rows that need logits."""

    questions: slice
    sequences: slice
    rows: slice


@dataclass(frozen=True)
class ConsistencyPlan:
    """B aligned tokens of K rows each; a row that is not there has length 0."""

    teachers: int  # K
    rows: Tensor  # [B * K] int64; packed positions, -1 where there is no row
    sequences: Tensor  # [B * K] int64
    lengths: Tensor  # [B * K] int64; length of the row's span
    tokens: Tensor  # [Q] int64; aligned tokens of each question


@dataclass(frozen=True)
class Plan:
    """The host's decisions, and the layout as far as kernels read it; tensors on the device."""

    num_sequences: int
    num_questions: int
    groups: list[Group]  # rows of a group fit a chunk, or it is one question
    most_teachers: int
    least_labels: int  # of a sequence that has some; 1 if none has
    targets: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S+1] int64
    cu_teachers: Tensor  # [Q+1] int64
    token_sequence: Tensor  # [T] int64
    label_counts: Tensor  # [S] int64
    rows: Tensor  # [n] int64; packed positions that need logits
    information_rows: Tensor  # [m] int64; packed positions where MI reads the gold logit
    information_question: Tensor  # [m] int64
    counted: Tensor  # [T] bool; positions whose gain enters MI
    thinking: Tensor | None  # [T] bool
    gold_ids: Tensor | None  # [G] int64; None: MI does not read them
    gold_counts: Tensor | None  # [Q] int64
    spans: Tensor | None  # [S, 2] int64; for mi="pvi"
    prior: Tensor | None  # [S] float32; for mi="pvi"
    shares: Tensor | None  # [S] float64; raw shares of the weightings that do not look at scores
    consistency: ConsistencyPlan | None


def make_plan(
    host: TokenLayout, config: CompactConfig, device: torch.device, max_rows: int
) -> Plan:
    """Decide rows, groups and consistency blocks. host: a layout on the CPU."""
    needed = host.labelled
    information = torch.zeros_like(needed)
    reads_gold = host.gold_ids is not None and config.mi != "pvi"
    if reads_gold:
        information = information_positions(host, config)
    if config.mi == "logprob":
        needed = needed | information
    rows = needed.nonzero().squeeze(1)
    at = information.nonzero().squeeze(1)
    widest, blocks = _consistency(host, config)
    there = send(
        {
            "targets": host.targets,
            "cu_seqlens": host.cu_seqlens,
            "cu_teachers": host.cu_teachers,
            "token_sequence": host.token_sequence,
            "label_counts": host.label_counts,
            "rows": rows,
            "information_rows": at,
            "information_question": host.sequence_question[host.token_sequence[at]],
            "counted": counted_positions(host, config),
            "thinking": host.thinking,
            "gold_ids": host.gold_ids if reads_gold else None,
            "gold_counts": host.cu_gold.diff() if host.cu_gold is not None else None,
            "spans": _spans(host) if config.mi == "pvi" else None,
            "prior": _prior(host) if config.mi == "pvi" else None,
            "shares": None if config.scored else _shares(host, config),
        },
        device,
    )
    consistency = None
    if blocks:
        consistency = ConsistencyPlan(widest, **send(blocks, device))
    return Plan(
        num_sequences=host.num_sequences,
        num_questions=host.num_questions,
        groups=_groups(host, rows, max_rows),
        most_teachers=int(host.teachers_per_question.max()),
        least_labels=min((n for n in host.label_counts.tolist() if n > 0), default=1),
        consistency=consistency,
        **there,
    )


def _groups(host: TokenLayout, rows: Tensor, max_rows: int) -> list[Group]:
    teachers = host.cu_teachers.tolist()
    bounds = torch.searchsorted(rows, host.cu_seqlens[host.cu_teachers]).tolist()
    groups, first = [], 0
    for q in range(host.num_questions):
        last = q + 1 == host.num_questions
        if last or bounds[q + 2] - bounds[first] > max_rows:
            groups.append(
                Group(
                    slice(first, q + 1),
                    slice(teachers[first], teachers[q + 1]),
                    slice(bounds[first], bounds[q + 1]),
                )
            )
            first = q + 1
    return groups


def _consistency(host: TokenLayout, config: CompactConfig) -> tuple[int, dict[str, Tensor]]:
    """(rows an aligned token, fields of a ConsistencyPlan on the CPU); empty: nothing to compare"""
    if config.consistency == "off":
        return 0, {}
    starts, lengths = consistency_spans(host, config)
    bounds = host.cu_teachers.tolist()
    blocks: list[list[tuple[int, int, int]]] = []
    tokens = [0] * host.num_questions
    for q in range(host.num_questions):
        members = [s for s in range(bounds[q], bounds[q + 1]) if lengths[s] > 0]
        if len(members) < 2:
            continue
        tokens[q] = sorted(lengths[s] for s in members)[-2]  # beyond it nothing is aligned
        blocks += [
            [(starts[s] + r, s, lengths[s]) for s in members if r < lengths[s]]
            for r in range(tokens[q])
        ]
    if not blocks:
        return 0, {}
    widest = max(len(block) for block in blocks)
    padded = [block + [(-1, block[0][1], 0)] * (widest - len(block)) for block in blocks]
    rows, sequences, spans = torch.tensor(padded).view(-1, 3).unbind(1)
    table = {"rows": rows, "sequences": sequences, "lengths": spans, "tokens": torch.tensor(tokens)}
    return widest, table


def _spans(host: TokenLayout) -> Tensor:
    if host.answer_spans is not None:
        return host.answer_spans
    return torch.zeros(host.num_sequences, 2, dtype=torch.long)


def _prior(host: TokenLayout) -> Tensor | None:
    return None if host.prior_logp is None else host.prior_logp.float()[host.sequence_question]


def information_of(
    plan: Plan,
    config: CompactConfig,
    gold_logit: Tensor | None,  # [T] float32
    logsumexp: Tensor | None,  # [T] float32
    sequences: slice = slice(None),
) -> Information:
    """What MI of these sequences is computed from, in the form that the configuration names."""
    if config.mi == "pvi":
        if plan.prior is None or plan.spans is None:
            return Information()
        return Information(spans=plan.spans[sequences], prior=plan.prior[sequences])
    if gold_logit is None:
        return Information()
    return Information(
        values=gold_logit,
        logsumexp=logsumexp if config.mi == "logprob" else None,
        counted=plan.counted,
        thinking=plan.thinking,
        thinking_weight=config.thinking_weight,
        other_weight=config.other_weight,
        length_norm=config.mi_length_norm,
    )


def weight_rule(
    config: CompactConfig,
    consensus: Tensor | None,  # [S]
    attention: Tensor | None,  # [S]
) -> tuple[WeightRule, Tensor | None]:
    """(rule, consensus that it reads [S])."""
    given: dict[str, tuple[ConsensusRule, Tensor | None]] = {
        "none": ("none", None),
        "attention": ("given", attention),
        "graph": ("none" if consensus is None else "given", consensus),
        "both": ("both", consensus),
    }
    kind, scores = given[config.consensus]
    b_mi, b_consensus, _ = config.betas
    scored = config.scored
    rule: Rule = "shares" if not scored else "best" if config.weighting == "best" else "softmax"
    return (
        WeightRule(
            rule=rule,
            betas=config.betas,
            consensus=kind,
            mi_used=scored and b_mi != 0,
            consensus_used=(scored and b_consensus != 0) or config.filter_below > 0,
            tau=config.tau,
            z_floor=config.z_floor,
            filter_below=config.filter_below,
        ),
        scores,
    )


def _shares(host: TokenLayout, config: CompactConfig) -> Tensor:
    """Raw shares [S] float64 of the weightings that do not look at scores."""
    weighting = config.weighting
    if not isinstance(weighting, str):
        return torch.tensor(weighting, dtype=torch.float64)[host.teachers]
    if weighting == "correct":
        assert host.correct is not None
        return (host.correct == 1).double()
    if weighting == "random":
        assert host.question_ids is not None
        question = host.question_ids[host.sequence_question]
        return _exponential_by_key(config.seed, question, host.teachers)
    assert weighting == "uniform", weighting
    return torch.ones(host.num_sequences, dtype=torch.float64)
