"""Held-out rationale NLL, for every teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compact_fast.evaluate.likelihood import Progress, evaluation_mode, logp_at, model_device
from compact_fast.evaluate.results import RationaleNll, TeacherNll
from compact_fast.loss import token_logp
from compact_fast.students import body_and_head
from compact_fast.trainer.batching import batches_within, question_lengths
from compact_fast.trainer.packing import pack_segments, packing_on, read_segments
from compact_fast.trainer.segments import attending_by_segments


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
    packing = packing_on(model, model_device(model))
    with evaluation_mode(model):
        if packing.kind == "segments":
            logp = _logp_by_segments(model, rows, batch_tokens, backend, progress)
        else:
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


def _logp_by_segments(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    batch_tokens: int,
    backend: Any,
    progress: Progress | None,
) -> list[Tensor]:
    """log p of every rationale's tokens, in order; prompts are read once, and nothing is padded."""
    parts, device = body_and_head(model), model_device(model)
    sizes = question_lengths(rows)
    found: dict[int, list[Tensor]] = {}
    total, done = int(sizes[3].sum()), 0
    for batch in batches_within(sizes[0] + sizes[1], batch_tokens):
        chosen = [rows[i] for i in batch]
        packed = pack_segments(chosen)
        with attending_by_segments(model):
            hidden = read_segments(parts.body, packed, device)[0]
        where: list[Tensor] = []
        lengths = []
        start = 0
        for row in chosen:
            P = len(row["prompt_ids"])
            for completion in row["completion_ids"]:
                where.append(packed["gather"][start + P - 1 : start + P + len(completion) - 1])
                lengths.append(len(completion))
                start += P + len(completion)
        wanted = torch.tensor([t for row in chosen for c in row["completion_ids"] for t in c])
        logp = token_logp(
            hidden[torch.cat(where).to(device)],
            parts.weight,
            wanted.to(device),
            backend=backend,
            head_bias=parts.bias,
            softcap=parts.softcap,
        )
        pieces = iter(torch.split(logp.cpu(), lengths))
        for i, row in zip(batch, chosen, strict=True):
            found[i] = [next(pieces) for _ in row["completion_ids"]]
        done += len(lengths)
        if progress is not None:
            progress(done, total)
    return [piece for i in range(len(rows)) for piece in found[i]]


def _summary(values: Sequence[float], targets: Sequence[Sequence[int]]) -> TeacherNll:
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    spread = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return TeacherNll(mean, math.sqrt(spread / n) if n > 1 else math.nan, n, sum(map(len, targets)))
