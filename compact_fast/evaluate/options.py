"""Multiple choice by likelihood: no generation, no parsing of answers."""

from __future__ import annotations

import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compact_fast.data.extract import option_index, truth_options
from compact_fast.data.records import Question
from compact_fast.evaluate.likelihood import Progress, evaluation_mode, logp_at
from compact_fast.evaluate.prompts import PromptBuilder
from compact_fast.evaluate.results import OptionLikelihood, Share

LEAD = "The answer is"


@dataclass(frozen=True)
class _Candidate:
    question: int
    form: str
    option: int
    target: list[int]
    size: int  # UTF-8 bytes of the option's own characters


def option_likelihood(
    model: Any,
    questions: Sequence[Question],
    prompts: PromptBuilder,
    *,
    lead: str = LEAD,
    batch_tokens: int = 16384,
    backend: Any = "auto",
    progress: Progress | None = None,
) -> OptionLikelihood:
    """Chooses the option with the largest log p(option | prompt, lead), nats.

    Two forms are scored: the option's "text", and its "letter" where options have letters. Each
    is judged by the plain sum and by the sum divided by the option's length in UTF-8 bytes
    ("per_byte", independent of the tokenizer). Ties go to the earlier
    option. Questions without choices are counted and left out; raises ValueError when none is
    left or a gold answer names no option.
    """
    started = time.perf_counter()
    chosen = [q for q in questions if q.choices]
    if not chosen:
        raise ValueError("no question has choices: option likelihood needs multiple choice")
    golds = [gold_option(q) for q in chosen]
    candidates: list[_Candidate] = []
    heads: list[list[int]] = []
    lead_ids = prompts.encode(lead)
    for i, question in enumerate(chosen):
        before = prompts.turn(question).lead
        heads.append(prompts.ids(question) + prompts.encode(before + lead))
        for form, texts in option_forms(question.choices or ()).items():
            for k, text in enumerate(texts):
                target = _continuation(prompts, lead, lead_ids, text)
                candidates.append(_Candidate(i, form, k, target, len(text.encode())))
    with evaluation_mode(model):
        scores, tokens = _scores(model, heads, candidates, batch_tokens, backend, progress)
    shares: dict[str, dict[str, Share]] = {}
    for form in ("letter", "text"):
        mine = [(c, s) for c, s in zip(candidates, scores, strict=True) if c.form == form]
        if not mine:
            continue
        shares[form] = {}
        for norm in ("sum", "per_byte"):
            best: dict[int, tuple[float, int]] = {}
            for c, score in mine:
                value = score / c.size if norm == "per_byte" else score
                if c.question not in best or value > best[c.question][0]:
                    best[c.question] = (value, c.option)
            shares[form][norm] = Share.of(float(k == golds[i]) for i, (_, k) in best.items())
    return OptionLikelihood(
        shares=shares,
        lead=lead,
        without_choices=len(questions) - len(chosen),
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def _continuation(prompts: PromptBuilder, lead: str, lead_ids: list[int], text: str) -> list[int]:
    joint = prompts.encode(f"{lead} {text}" if lead else text)
    if joint[: len(lead_ids)] == lead_ids and len(joint) > len(lead_ids):
        return joint[len(lead_ids) :]
    # The tokenizer merges across the boundary: the option by itself is the nearest continuation.
    return prompts.encode(f" {text}" if lead else text)


def _scores(
    model: Any,
    heads: Sequence[list[int]],
    candidates: Sequence[_Candidate],
    batch_tokens: int,
    backend: Any,
    progress: Progress | None,
) -> tuple[list[float], int]:
    # An option's last token is predicted, never read: options that differ only there share a
    # forward pass. All letters of a question do.
    row_of: dict[tuple[int, ...], int] = {}
    positions: list[list[int]] = []
    targets: list[list[int]] = []
    place: list[tuple[int, int]] = []
    for c in candidates:
        head = heads[c.question]
        row = row_of.setdefault((*head, *c.target[:-1]), len(row_of))
        if row == len(positions):
            positions.append([])
            targets.append([])
        place.append((row, len(targets[row])))
        positions[row].extend(range(len(head) - 1, len(head) - 1 + len(c.target)))
        targets[row].extend(c.target)
    sequences = [list(ids) for ids in row_of]
    logp: list[Tensor] = logp_at(
        model,
        sequences,
        positions,
        targets,
        batch_tokens=batch_tokens,
        backend=backend,
        progress=progress,
    )
    scores = [
        float(logp[row].double()[start : start + len(c.target)].sum())
        for c, (row, start) in zip(candidates, place, strict=True)
    ]
    return scores, sum(map(len, sequences))


def option_forms(choices: Sequence[str]) -> dict[str, list[str]]:
    """What is scored: the options' letters and texts; True/False and Yes/No have no letters."""
    forms = {"text": list(choices)}
    if not truth_options(choices):
        forms["letter"] = list(string.ascii_uppercase[: len(choices)])
    return forms


def gold_option(question: Question) -> int:
    """Index of the gold option. Raises ValueError if the gold answer names none."""
    choices = list(question.choices or ())
    index = option_index(question.answer, choices)
    if index is None:
        raise ValueError(
            f"{question.source or question.id}: gold answer {question.answer!r} names none of the "
            f"{len(choices)} choices; give a letter or an option's text"
        )
    return index
