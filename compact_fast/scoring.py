"""Every rationale's scores and weight for a student as it is, without training.

The forward pass and the loss are those of the trainer's step, so that the weights are the ones
its first step would use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compact_fast.atomic import atomic_file
from compact_fast.backends import CompactBackend
from compact_fast.config import CompactConfig
from compact_fast.students import check_head, inference
from compact_fast.trainer.step import Collator, compact_step, direct_body

Row = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (questions done, questions in all)."""

COLUMNS = (
    *("id", "teacher", "mi", "consensus", "nll", "weight"),
    *("filtered", "nonfinite", "correct", "tokens"),
)
_ROW_GROUP = 8192  # rationales written to the file at once


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Any,
    *,
    teachers: Sequence[str],
    thinking_ids: Sequence[int],
    config: CompactConfig | None = None,
    backend: CompactBackend | str = "auto",
    batch_tokens: int = 8192,
    window: int = 512,
    batches: Sequence[Sequence[int]] | None = None,
    share_prompts: bool = True,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Yield one row a rationale, question by question in the order of `rows`.

    A row: id, teacher, mi, consensus, nll (nats a token), weight (alpha), filtered, nonfinite,
    correct (True, False, None unknown), tokens (of the completion). A score that is not there or
    not finite is None.

    `rows` are tokenised questions. Questions of similar length share a forward pass of at most
    `batch_tokens` padded tokens (one question at least), chosen among `window` questions at a
    time, so that memory stays flat; `batches` (lists of places in `rows`, each place once) sets
    the passes by hand. Raises ValueError as the loss does.
    """
    config = config or CompactConfig()
    check_head(model)
    collator = Collator.of(model, tokenizer, config, thinking_ids, share_prompts=share_prompts)
    done = 0
    for group in _windows(rows, window, batch_tokens) if batches is None else [batches]:
        found: dict[int, list[Row]] = {}
        for batch in group:
            chosen = [rows[i] for i in batch]
            scored = _score(model, collator, chosen, teachers, config, backend)
            found.update(zip(batch, scored, strict=True))
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
        for i in sorted(found):
            yield from found[i]


def _windows(rows: Any, window: int, batch_tokens: int) -> Iterator[list[list[int]]]:
    """Batches of similar questions, window by window."""
    for start in range(0, len(rows), window):
        places = range(start, min(start + window, len(rows)))
        # (sequences, longest) of each question; together they pad to the batch's longest
        sizes = {i: _size(rows[i]) for i in places}
        batches: list[list[int]] = []
        sequences = longest = 0
        for i in sorted(places, key=lambda i: (-sizes[i][1], i)):
            K, length = sizes[i]
            if batches and (sequences + K) * longest <= batch_tokens:
                batches[-1].append(i)
                sequences += K
            else:
                batches.append([i])
                sequences, longest = K, length
        yield batches


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    lengths = [len(completion) for completion in row["completion_ids"]]
    return len(lengths), len(row["prompt_ids"]) + max(lengths, default=0)


@torch.no_grad()
def _score(
    model: Any,
    collator: Collator,
    rows: Sequence[Mapping[str, Any]],
    teachers: Sequence[str],
    config: CompactConfig,
    backend: CompactBackend | str,
) -> list[list[Row]]:
    """The rows of each question of one batch."""
    inputs = _to(collator(rows), next(model.parameters()).device)
    with inference(model):
        out = compact_step(direct_body(model), model, inputs, config=config, backend=backend)
    columns = {
        name: getattr(out, name if name != "weight" else "weights").tolist()
        for name in ("mi", "consensus", "nll", "weight", "filtered", "nonfinite")
    }
    scored: list[list[Row]] = []
    s = 0
    for row in rows:
        mine = []
        for k, teacher in enumerate(row["teacher_ids"]):
            values = {name: _number(column[s]) for name, column in columns.items()}
            known = row["correct"][k]
            mine.append(
                {
                    "id": row["id"],
                    "teacher": teachers[teacher],
                    **values,
                    "correct": None if known < 0 else bool(known),
                    "tokens": len(row["completion_ids"][k]),
                }
            )
            s += 1
        scored.append(mine)
    return scored


def _number(value: float | bool) -> float | bool | None:
    return value if isinstance(value, bool) or math.isfinite(value) else None


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {name: _to(value, device) for name, value in inputs.items()}
    return inputs.to(device) if hasattr(inputs, "to") else inputs


def write_scores(
    path: str | Path, scored: Iterable[Row], *, info: Mapping[str, str] | None = None
) -> dict[str, dict[str, float]]:
    """Stream rows of `score_rows` into a parquet file that appears when it is whole.

    `info` goes into the file's metadata. Returns for each teacher: rationales, the means of
    weight, mi, consensus and nll, filtered and right (shares; right among those known), weighed
    over all its rationales. Raises DiskFullError when the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict.fromkeys(("mi", "consensus", "nll", "weight"), pa.float64())
    types |= {"id": pa.string(), "teacher": pa.string(), "tokens": pa.int64()}
    schema = pa.schema(
        [(name, types.get(name, pa.bool_())) for name in COLUMNS], metadata=dict(info or {})
    )
    summary = _Summary()
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        waiting: list[Row] = []
        for row in scored:
            summary.add(row)
            waiting.append(row)
            if len(waiting) == _ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
    return summary.by_teacher()


class _Summary:
    """Running means by teacher."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[float]]] = {}

    def add(self, row: Row) -> None:
        sums = self._sums.setdefault(row["teacher"], {})
        for name in ("weight", "mi", "consensus", "nll", "filtered"):
            self._count(sums, name, row[name])
        self._count(sums, "right", row["correct"])

    @staticmethod
    def _count(sums: dict[str, list[float]], name: str, value: float | None) -> None:
        total = sums.setdefault(name, [0.0, 0.0])
        if value is not None:
            total[0] += value
            total[1] += 1

    def by_teacher(self) -> dict[str, dict[str, float]]:
        out = {}
        for teacher, sums in self._sums.items():
            out[teacher] = {"rationales": sums["filtered"][1]}
            out[teacher] |= {name: s / n for name, (s, n) in sums.items() if n}
        return out
