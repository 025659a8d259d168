"""What the host decides before a step on a GPU, from the layout's copy on the CPU.

Everything that depends on values measured in the step stays on the device; everything here depends
on the layout and the configuration alone, so that the step itself never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import consistency_spans
from compact_fast.scores import _exponential_by_key, counted_positions, information_positions
from compact_fast.triton_kernels.teacher_weights import ConsensusRule, Information, Rule, WeightRule


@dataclass(frozen=True)
class Group:
    """Consecutive whole questions, and their rows among all rows that need logits."""

    questions: slice
    sequences: slice
    rows: slice


@dataclass(frozen=True)
class Plan:
    """The host's decisions; tensors are on the device."""

    rows: Tensor  # [n] int64; packed positions that need logits
    groups: list[Group]  # rows of a group fit a chunk, or it is one question
    most_teachers: int
    information_rows: Tensor  # [m] int64; packed positions where MI reads the gold logit
    information_question: Tensor  # [m] int64
    consistency: ConsistencyPlan | None


@dataclass(frozen=True)
class ConsistencyPlan:
    """B aligned tokens of K rows each; a row that is not there has length 0."""

    teachers: int  # K
    rows: Tensor  # [B * K] int64; packed positions, -1 where there is no row
    sequences: Tensor  # [B * K] int64
    lengths: Tensor  # [B * K] int64; length of the row's span
    tokens: Tensor  # [Q] int64; aligned tokens of each question


def host_copy(layout: TokenLayout) -> TokenLayout:
    """What the plan needs of a layout, on the CPU; a layout that is there already is not copied."""
    if layout.device.type == "cpu":
        return layout
    kept = ("targets", "cu_seqlens", "cu_teachers", "assistant", "real", "gold_ids", "cu_gold")
    fields = layout.tensors()
    wanted = {name: fields[name] for name in (*kept, "answer_spans") if name in fields}
    return TokenLayout(**{name: value.to("cpu") for name, value in wanted.items()})


def make_plan(
    host: TokenLayout, config: CompactConfig, device: torch.device, max_rows: int
) -> Plan:
    """Decide rows, groups and consistency blocks. host: a layout on the CPU."""

    def send(value: Tensor) -> Tensor:
        if device.type == "cuda":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    needed = host.labelled
    information = torch.zeros_like(needed)
    if host.gold_ids is not None and config.mi != "pvi":
        information = information_positions(host, config)
    if config.mi == "logprob":
        needed = needed | information
    rows = needed.nonzero().squeeze(1)
    at = information.nonzero().squeeze(1)
    question = host.sequence_question[host.token_sequence[at]]
    return Plan(
        rows=send(rows),
        groups=_groups(host, rows, max_rows),
        most_teachers=int(host.teachers_per_question.max()),
        information_rows=send(at),
        information_question=send(question),
        consistency=_consistency(host, config, send),
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


def _consistency(
    host: TokenLayout, config: CompactConfig, send: Callable[[Tensor], Tensor]
) -> ConsistencyPlan | None:
    if config.consistency == "off":
        return None
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
        return None
    widest = max(len(block) for block in blocks)
    padded = [block + [(-1, block[0][1], 0)] * (widest - len(block)) for block in blocks]
    table = torch.tensor(padded).view(-1, 3).unbind(1)
    rows, sequences, spans = (send(column.contiguous()) for column in table)
    return ConsistencyPlan(widest, rows, sequences, spans, send(torch.tensor(tokens)))


def information_of(
    layout: TokenLayout,
    config: CompactConfig,
    gold_logit: Tensor | None,  # [T] float32
    logsumexp: Tensor | None,  # [T] float32
    sequences: slice = slice(None),
) -> Information:
    """What MI of these sequences is computed from, in the form that the configuration names."""
    if config.mi == "pvi":
        if layout.prior_logp is None:
            return Information()
        if layout.answer_spans is None:
            spans = torch.zeros(layout.num_sequences, 2, dtype=torch.long, device=layout.device)
        else:
            spans = layout.answer_spans
        prior = layout.prior_logp.float()[layout.sequence_question]
        return Information(spans=spans[sequences].contiguous(), prior=prior[sequences])
    if gold_logit is None:
        return Information()
    return Information(
        values=gold_logit,
        logsumexp=logsumexp if config.mi == "logprob" else None,
        counted=counted_positions(layout, config),
        thinking=layout.thinking,
        thinking_weight=config.thinking_weight,
        other_weight=config.other_weight,
        length_norm=config.mi_length_norm,
    )


def weight_rule(
    layout: TokenLayout,
    config: CompactConfig,
    consensus: Tensor | None,  # [S]
    attention: Tensor | None,  # [S]
) -> tuple[WeightRule, Tensor | None, Tensor | None]:
    """(rule, consensus that it reads [S], raw shares [S] for rules that do not score)."""
    scored = config.weighting in ("compact", "mi", "consensus", "difficulty", "best")
    given: dict[str, tuple[ConsensusRule, Tensor | None]] = {
        "none": ("none", None),
        "attention": ("given", attention),
        "graph": ("none" if consensus is None else "given", consensus),
        "both": ("both", consensus),
    }
    kind, scores = given[config.consensus]
    b_mi, b_consensus, _ = config.betas
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
        None if scored else _shares(layout, config),
    )


def _shares(layout: TokenLayout, config: CompactConfig) -> Tensor:
    """Raw shares [S] of the weightings that do not look at scores."""
    weighting = config.weighting
    if not isinstance(weighting, str):
        return torch.tensor(weighting, dtype=torch.float64, device=layout.device)[layout.teachers]
    if weighting == "correct":
        assert layout.correct is not None
        return (layout.correct == 1).double()
    if weighting == "random":
        assert layout.question_ids is not None
        question = layout.question_ids[layout.sequence_question]
        return _exponential_by_key(config.seed, question, layout.teachers)
    assert weighting == "uniform", weighting
    return torch.ones(layout.num_sequences, device=layout.device)
