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
    tokens = _Tokens(_sequences(rows))
    return tokens.padded(
        _Told.of(rows), thinking_ids, pad_id, padding_side, keep_padding, _consensus(rows)
    )


def collate_layout(
    rows: Sequence[Mapping[str, Any]], *, thinking_ids: Sequence[int]
) -> dict[str, Any]:
    """layout, consensus and ids of `collate`, for who lays out the body's tokens otherwise."""
    layout = _Tokens(_sequences(rows)).layout(_Told.of(rows), thinking_ids)
    return {"layout": layout, "consensus": _consensus(rows), "ids": _ids(rows)}


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
    told = _Told([1] * len(rows), None, None, rows)
    return _Tokens(sequences).padded(told, thinking_ids, pad_id, padding_side, False, None)


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


def _sequences(rows: Sequence[Mapping[str, Any]]) -> list[_Sequence]:
    for row in rows:
        if not row["completion_ids"]:
            raise ValueError(f"question {row['id']}: no completions; leave it out of the batch")
    return [
        _Sequence(row["prompt_ids"], completion, _span(row["answer_spans"][k], row["id"]))
        for row in rows
        for k, completion in enumerate(row["completion_ids"])
    ]


@dataclass(frozen=True)
class _Told:
    """What rows say of their questions and sequences, beside tokens."""

    per_question: list[int]  # [Q] sequences
    teacher_ids: list[int] | None  # [S]
    correct: list[int] | None  # [S]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> _Told:
        """Every rationale of every question."""
        return cls(
            [len(row["completion_ids"]) for row in rows],
            [k for row in rows for k in row["teacher_ids"]],
            [c for row in rows for c in row["correct"]],
            rows,
        )

    def fields(self) -> dict[str, Tensor]:
        """As a TokenLayout names them."""
        gold = [row["gold_ids"] for row in self.rows]
        out = {
            "cu_teachers": _offsets(self.per_question),
            "gold_ids": int_tensor([t for g in gold for t in g]),
            "cu_gold": _offsets([len(g) for g in gold]),
            "question_ids": int_tensor([row["index"] for row in self.rows]),
        }
        if self.teacher_ids is not None:
            out["teacher_ids"] = int_tensor(self.teacher_ids)
        if self.correct is not None:
            out["correct"] = int_tensor(self.correct)
        return out


class _Tokens:
    """The N real tokens of S sequences, one behind another; in numpy, whose arrays are quicker to
    make."""

    def __init__(self, sequences: Sequence[_Sequence]) -> None:
        if not sequences:
            raise ValueError("a batch needs at least one question")
        self.lengths = np.array([len(seq.ids) for seq in sequences], dtype=np.int64)  # [S]
        S, N = len(sequences), int(self.lengths.sum())
        self.ids = np.fromiter(chain.from_iterable(seq.ids for seq in sequences), np.int64, N)
        self.origin = self.lengths.cumsum() - self.lengths  # [S] where each sequence begins
        self.sequence = np.repeat(np.arange(S), self.lengths)  # [N]
        self.position = np.arange(N) - self.origin[self.sequence]  # [N]
        first, last = np.array([seq.labels for seq in sequences], dtype=np.int64).T
        self.labelled = (first[self.sequence] <= self.position) & (
            self.position < last[self.sequence]
        )  # [N]
        self.answers = np.array([seq.answer for seq in sequences], dtype=np.int64).reshape(S, 2)

    def layout(self, told: _Told, thinking_ids: Sequence[int]) -> TokenLayout:
        """Of the real tokens alone."""
        targets = np.full(len(self.ids), IGNORE, dtype=np.int64)
        follows = self.labelled[1:] & (self.sequence[1:] == self.sequence[:-1])
        targets[:-1][follows] = self.ids[1:][follows]
        return TokenLayout(
            targets=torch.from_numpy(targets),
            cu_seqlens=_offsets(self.lengths),
            input_ids=torch.from_numpy(self.ids),
            thinking=torch.from_numpy(_among(self.ids, thinking_ids)),
            answer_spans=self._spans(self.origin),
            **told.fields(),
        )

    def padded(
        self,
        told: _Told,
        thinking_ids: Sequence[int],
        pad_id: int,
        padding_side: Literal["right", "left"],
        keep_padding: bool,
        consensus: Tensor | None,
    ) -> Batch:
        """Sequences as rows of equal length."""
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r}: expected right or left")
        S, L = len(self.lengths), int(self.lengths.max())
        left = L - self.lengths if padding_side == "left" else np.zeros_like(self.lengths)
        starts = np.arange(S) * L + left  # [S] flat place of each sequence's first real token
        gather = starts[self.sequence] + self.position  # [N]

        def padded(values: Ints | int, fill: int) -> Tensor:  # [N] -> [S, L]
            out = np.full(S * L, fill, dtype=np.int64)
            out[gather] = values
            return torch.from_numpy(out.reshape(S, L))

        input_ids, mask = padded(self.ids, pad_id), padded(1, 0)
        position_ids, places = padded(self.position, 0), gather
        if keep_padding:
            labels = padded(np.where(self.labelled, self.ids, IGNORE), IGNORE)
            layout = TokenLayout.from_padded(
                input_ids, mask, labels, thinking_ids=thinking_ids,
                answer_spans=self._spans(starts), **told.fields(),
            )  # fmt: skip
            places = np.arange(S * L)
        else:
            layout = self.layout(told, thinking_ids)
        at = torch.from_numpy(places)
        return Batch(input_ids, mask, position_ids, at, layout, consensus, _ids(told.rows))

    def _spans(self, origin: Ints) -> Tensor:
        """Answer spans [S, 2] in a layout where sequences begin at `origin` [S]: the token at a is
        predicted at a - 1, so spans over tokens become spans over labels."""
        stated = self.answers[:, 1:] > self.answers[:, :1]
        return torch.from_numpy(np.where(stated, self.answers + origin[:, None] - 1, 0))


def _among(ids: Ints, few: Sequence[int]) -> NDArray[np.bool_]:
    """Which ids are some of a few; np.isin sorts them all."""
    found = np.zeros(len(ids), dtype=np.bool_)
    for one in few:
        found |= ids == one
    return found


def _consensus(rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """[S] float32, or None where rows hold no scores."""
    if any(row.get("consensus") is None for row in rows):
        return None
    return torch.tensor([score for row in rows for score in row["consensus"]], dtype=torch.float32)


def _ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(row["id"]) for row in rows]


def int_tensor(values: Sequence[int]) -> Tensor:
    """int64, as torch.tensor would make it, in a third of the time."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _offsets(sizes: Sequence[int] | Ints) -> Tensor:
    out = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=out[1:])
    return torch.from_numpy(out)
