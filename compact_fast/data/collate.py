"""Tokenised rows to one batch: padded ids for the student's body, a packed layout for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compact_fast.layout import IGNORE, TokenLayout


@dataclass(frozen=True, eq=False)
class Batch:
    """S sequences of Q whole questions, padded to L; T packed positions."""

    input_ids: Tensor  # [S, L] int64
    attention_mask: Tensor  # [S, L] int64; 1 at real tokens
    position_ids: Tensor  # [S, L] int64; position inside the sequence, 0 at padding
    gather: Tensor  # [T] int64; where each packed position lies in input_ids.reshape(-1)
    layout: TokenLayout  # T positions, on the CPU
    consensus: Tensor | None  # [S] float32; None where the rows hold no scores
    ids: list[str]  # [Q] the questions' ids


def collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    thinking_ids: Sequence[int],
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
    keep_padding: bool = False,
) -> Batch:
    """All rationales of these questions, one sequence each, in the order given.

    A sequence is the prompt and one completion; every completion token is a label. With
    `keep_padding` the layout holds all S * L positions, PAD included, as mode="reference" needs.
    Raises ValueError on no rows, and on a question without completions.
    """
    sequences = [
        _Sequence(row["prompt_ids"], completion, _span(row["answer_spans"][k], row["id"]))
        for row in rows
        for k, completion in enumerate(row["completion_ids"])
    ]
    for row in rows:
        if not row["completion_ids"]:
            raise ValueError(f"question {row['id']}: no completions; leave it out of the batch")
    has_scores = all(row.get("consensus") is not None for row in rows)
    scores = [score for row in rows for score in row["consensus"]] if has_scores else []
    return _batch(
        rows,
        sequences,
        per_question=[len(row["completion_ids"]) for row in rows],
        teacher_ids=[k for row in rows for k in row["teacher_ids"]],
        correct=[c for row in rows for c in row["correct"]],
        consensus=torch.tensor(scores, dtype=torch.float32) if has_scores else None,
        thinking_ids=thinking_ids,
        pad_id=pad_id,
        padding_side=padding_side,
        keep_padding=keep_padding,
    )


def collate_priors(
    rows: Sequence[Mapping[str, Any]],
    *,
    thinking_ids: Sequence[int],
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> Batch:
    """One short sequence a question: the prompt, then a completion that only states the answer.

    Only the gold answer's tokens are labels, so that the sum of their log-likelihoods over
    sequence q is log p(gold | question), the layout's `prior_logp` [Q] for mi="pvi".
    """
    sequences = [
        _Sequence(
            row["prompt_ids"],
            row["prior_completion_ids"],
            span := _span(row["prior_span"], row["id"]),
            labels=span,
        )
        for row in rows
    ]
    return _batch(
        rows,
        sequences,
        per_question=[1] * len(rows),
        teacher_ids=None,
        correct=None,
        consensus=None,
        thinking_ids=thinking_ids,
        pad_id=pad_id,
        padding_side=padding_side,
        keep_padding=False,
    )


class _Sequence:
    """Token ids of prompt and completion, with the token ranges that matter."""

    def __init__(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        answer: tuple[int, int],
        labels: tuple[int, int] | None = None,
    ) -> None:
        self.ids = [*prompt, *completion]
        self.answer = answer
        self.labels = labels or (len(prompt), len(self.ids))


def _span(span: Sequence[int], question: str) -> tuple[int, int]:
    start, end = (int(i) for i in span)
    if start > end or (start == 0 and end > 0):
        raise ValueError(f"question {question}: answer span [{start}, {end}) is no token range")
    return start, end


def _batch(
    rows: Sequence[Mapping[str, Any]],
    sequences: Sequence[_Sequence],
    *,
    per_question: Sequence[int],
    teacher_ids: Sequence[int] | None,
    correct: Sequence[int] | None,
    consensus: Tensor | None,
    thinking_ids: Sequence[int],
    pad_id: int,
    padding_side: Literal["right", "left"],
    keep_padding: bool,
) -> Batch:
    if not rows:
        raise ValueError("a batch needs at least one question")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side={padding_side!r}: expected right or left")
    S, L = len(sequences), max(len(s.ids) for s in sequences)
    input_ids = torch.full((S, L), pad_id, dtype=torch.long)
    labels = torch.full((S, L), IGNORE, dtype=torch.long)
    mask = torch.zeros((S, L), dtype=torch.long)
    position_ids = torch.zeros((S, L), dtype=torch.long)
    starts = []  # [S] flat place of each sequence's first real token
    for s, seq in enumerate(sequences):
        n = len(seq.ids)
        left = L - n if padding_side == "left" else 0
        ids = torch.tensor(seq.ids, dtype=torch.long)
        input_ids[s, left : left + n] = ids
        mask[s, left : left + n] = 1
        position_ids[s, left : left + n] = torch.arange(n)
        first, last = seq.labels
        labels[s, left + first : left + last] = ids[first:last]
        starts.append(s * L + left)

    offset, origin = 0, []  # origin [S]: where sequence s begins in the layout
    for s, seq in enumerate(sequences):
        origin.append(starts[s] if keep_padding else offset)
        offset += len(seq.ids)
    # The token at a is predicted at a - 1: spans over tokens become spans over labels.
    spans = torch.tensor(
        [
            (o + seq.answer[0] - 1, o + seq.answer[1] - 1)
            if seq.answer[1] > seq.answer[0]
            else (0, 0)
            for o, seq in zip(origin, sequences, strict=True)
        ],
        dtype=torch.long,
    ).reshape(S, 2)
    gold = [row["gold_ids"] for row in rows]
    rest: dict[str, Tensor] = {
        "gold_ids": torch.tensor([t for g in gold for t in g], dtype=torch.long),
        "cu_gold": _offsets([len(g) for g in gold]),
        "answer_spans": spans,
        "question_ids": torch.tensor([row["index"] for row in rows], dtype=torch.long),
    }
    if teacher_ids is not None:
        rest["teacher_ids"] = torch.tensor(teacher_ids, dtype=torch.long)
    if correct is not None:
        rest["correct"] = torch.tensor(correct, dtype=torch.long)
    padded = (
        TokenLayout.from_padded(
            input_ids, mask, labels, _offsets(per_question), thinking_ids, **rest
        )
        if keep_padding
        else None
    )
    if padded is not None:
        return Batch(
            input_ids, mask, position_ids, torch.arange(S * L), padded, consensus, _ids(rows)
        )
    gather = mask.reshape(-1).nonzero().reshape(-1)
    packed_ids = input_ids.reshape(-1)[gather]
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    layout = TokenLayout(
        targets=targets.reshape(-1)[gather],
        cu_seqlens=_offsets([len(seq.ids) for seq in sequences]),
        cu_teachers=_offsets(per_question),
        input_ids=packed_ids,
        thinking=torch.isin(packed_ids, torch.tensor(list(thinking_ids), dtype=torch.long)),
        **rest,
    )
    return Batch(input_ids, mask, position_ids, gather, layout, consensus, _ids(rows))


def _ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(row["id"]) for row in rows]


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.long).cumsum(0)
