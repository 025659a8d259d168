"""Tokenised rows to one batch: padded ids for the student's body, a packed layout for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compact_fast.layout import IGNORE, TokenLayout

Ints = NDArray[np.int64]


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
    # N real tokens, sequence by sequence; all in numpy, whose arrays are quicker to make
    lengths = np.array([len(seq.ids) for seq in sequences], dtype=np.int64)  # [S]
    S, L, N = len(sequences), int(lengths.max()), int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(seq.ids for seq in sequences), np.int64, N)
    ends = lengths.cumsum()
    sequence = np.repeat(np.arange(S), lengths)  # [N]
    position = np.arange(N) - (ends - lengths)[sequence]  # [N]
    left = L - lengths if padding_side == "left" else np.zeros_like(lengths)
    starts = np.arange(S) * L + left  # [S] flat place of each sequence's first real token
    gather = starts[sequence] + position  # [N]
    first, last = np.array([seq.labels for seq in sequences], dtype=np.int64).T
    labelled = (first[sequence] <= position) & (position < last[sequence])  # [N]

    def padded(values: Ints | int, fill: int) -> Tensor:  # [N] -> [S, L]
        out = np.full(S * L, fill, dtype=np.int64)
        out[gather] = values
        return torch.from_numpy(out.reshape(S, L))

    input_ids, mask = padded(ids, pad_id), padded(1, 0)
    position_ids = padded(position, 0)
    # The token at a is predicted at a - 1: spans over tokens become spans over labels.
    origin = starts if keep_padding else ends - lengths  # [S] where a sequence begins in the layout
    answers = np.array([seq.answer for seq in sequences], dtype=np.int64).reshape(S, 2)
    stated = answers[:, 1:] > answers[:, :1]
    spans = torch.from_numpy(np.where(stated, answers + origin[:, None] - 1, 0))
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
    if keep_padding:
        labels = padded(np.where(labelled, ids, IGNORE), IGNORE)
        whole = TokenLayout.from_padded(
            input_ids, mask, labels, _offsets(per_question), thinking_ids, **rest
        )
        every = torch.arange(S * L)
        return Batch(input_ids, mask, position_ids, every, whole, consensus, _ids(rows))
    packed_ids = torch.from_numpy(ids)
    targets = np.full(N, IGNORE, dtype=np.int64)
    told = labelled[1:] & (sequence[1:] == sequence[:-1])
    targets[:-1][told] = ids[1:][told]
    layout = TokenLayout(
        targets=torch.from_numpy(targets),
        cu_seqlens=_offsets(lengths.tolist()),
        cu_teachers=_offsets(per_question),
        input_ids=packed_ids,
        thinking=torch.isin(packed_ids, torch.tensor(list(thinking_ids), dtype=torch.long)),
        **rest,
    )
    places = torch.from_numpy(gather)
    return Batch(input_ids, mask, position_ids, places, layout, consensus, _ids(rows))


def _ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(row["id"]) for row in rows]


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.long).cumsum(0)
