"""Held-out rationale NLL, for every teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from compact_fast.evaluate.likelihood import Progress, evaluation_mode, logp_at
from compact_fast.evaluate.results import RationaleNll, TeacherNll


def rationale_nll(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    teachers: Sequence[str],
    *,
    batch_tokens: int = 16384,
    backend: Any = "auto",
    progress: Progress | None = None,
) -> RationaleNll:
    """Difficulty S_NLL (mean over a rationale's tokens, end-of-turn included) of held-out rows.

    `rows` are tokenised questions (`prompt_ids`, `completion_ids`, `teacher_ids`). Every teacher's
    figure is the mean over its rationales. A rationale whose NLL is not finite is left out and
    counted. Raises ValueError when there is no rationale at all.
    """
    started = time.perf_counter()
    sequences: list[list[int]] = []
    positions: list[range] = []
    targets: list[list[int]] = []
    owner: list[int] = []
    for row in rows:
        prompt = list(row["prompt_ids"])
        if not prompt:
            raise ValueError(f"question {row['id']!r}: no prompt tokens, nothing to condition on")
        for completion, teacher in zip(row["completion_ids"], row["teacher_ids"], strict=True):
            sequences.append(prompt + list(completion[:-1]))
            positions.append(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
            targets.append(list(completion))
            owner.append(teacher)
    if not sequences:
        raise ValueError("no rationales to evaluate: give a file whose questions have rationales")
    with evaluation_mode(model):
        logp = logp_at(
            model,
            sequences,
            positions,
            targets,
            batch_tokens=batch_tokens,
            backend=backend,
            progress=progress,
        )
    values = [-float(part.double().mean()) for part in logp]
    kept = [i for i, v in enumerate(values) if math.isfinite(v)]
    by_teacher: dict[str, TeacherNll] = {}
    for t, name in enumerate(teachers):
        mine = [i for i in kept if owner[i] == t]
        if mine:
            by_teacher[name] = _summary([values[i] for i in mine], [targets[i] for i in mine])
    return RationaleNll(
        overall=_summary([values[i] for i in kept], [targets[i] for i in kept]),
        teachers=by_teacher,
        nonfinite=len(values) - len(kept),
        tokens=sum(len(s) for s in sequences),
        seconds=time.perf_counter() - started,
    )


def _summary(values: Sequence[float], targets: Sequence[Sequence[int]]) -> TeacherNll:
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    spread = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return TeacherNll(mean, math.sqrt(spread / n) if n > 1 else math.nan, n, sum(map(len, targets)))
