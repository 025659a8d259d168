"""Every rationale's scores and weight for a student as it is, without training.

The forward pass and the loss are those of the trainer's step, so that the weights are the ones
its first step would use.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import torch

from compact_fast._version import __version__
from compact_fast.atomic import (
    atomic_file,
    atomic_write_text,
    remove_directory,
    remove_leftovers,
)
from compact_fast.backends import CompactBackend, choose
from compact_fast.config import CompactConfig
from compact_fast.lean import lean_inference
from compact_fast.output import CompactOutput
from compact_fast.students import check_head, inference
from compact_fast.trainer.batching import batches_within, question_lengths, sequence_tokens
from compact_fast.trainer.step import (
    Collator,
    compact_step,
    direct_body,
    heeding,
    run_spec,
    to_device,
)

Row = dict[str, Any]

COLUMNS = (
    *("id", "teacher", "mi", "consensus", "nll", "weight"),
    *("filtered", "nonfinite", "correct", "tokens"),
)
_ROW_GROUP = 8192  # rationales written to the file at once


@dataclass(frozen=True)
class Done:
    """How far scoring is. `tokens` are of rationales and their prompts, as separate sequences."""

    questions: int
    of_questions: int
    tokens: int
    of_tokens: int
    resumed_tokens: int
    """Of `tokens`, those that an earlier, interrupted call has scored."""

    seconds: float
    """Since this call began."""

    @property
    def tokens_per_second(self) -> float:
        """Of this call."""
        return (self.tokens - self.resumed_tokens) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At this speed; infinite before the first batch."""
        speed = self.tokens_per_second
        return (self.of_tokens - self.tokens) / speed if speed else math.inf


Progress = Callable[[Done], None]


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
    `batch_tokens` tokens, padding included (one question at least), chosen among `window` questions
    at a time, so that memory stays flat; `batches` (lists of places in `rows`, each place once)
    sets the passes by hand. Raises ValueError as the loss does.
    """
    scorer = _Scorer(
        model, tokenizer, teachers, thinking_ids, config, backend, batch_tokens, share_prompts
    )
    count = _Counter(rows, progress)
    if batches is not None:
        yield from scorer.window(rows, count, batches)
        return
    for start in range(0, len(rows), window):
        yield from scorer.window(_slice(rows, start, start + window), count)


def score_file(
    path: str | Path,
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
    share_prompts: bool = True,
    progress: Progress | None = None,
    info: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """`score_rows` into a parquet file; what a killed call has done is not done again.

    Every window's scores are kept in a folder beside the file until the file is whole. A later call
    with the same student, rows and settings takes them up and ends in the same bytes; other parts
    are thrown away. Returns and raises what `write_scores` does.
    """
    scorer = _Scorer(
        model, tokenizer, teachers, thinking_ids, config, backend, batch_tokens, share_prompts
    )
    path = Path(path)
    parts = _Parts(path.with_name(f".{path.name}.parts"), scorer.identity(rows, window))
    starts = range(0, len(rows), window)
    count = _Counter(rows, progress, kept=[s for s in starts if parts.has(s)], window=window)
    for start in starts:
        if not parts.has(start):
            parts.add(start, scorer.window(_slice(rows, start, start + window), count))
    summary = write_scores(path, (row for s in starts for row in parts.read(s)), info=info)
    parts.remove()
    return summary


def _slice(rows: Any, start: int, stop: int) -> list[Mapping[str, Any]]:
    """Rows [start, stop) as a list of dicts; of a dataset in one piece."""
    if not hasattr(rows, "select"):
        return list(rows[start:stop])
    columns = rows[start:stop]
    table = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in table]


def _digest(rows: Any, step: int) -> str:
    """A hash of all rows."""
    digest = hashlib.sha256()
    arrow = rows.with_format("arrow") if hasattr(rows, "select") else None
    for start in range(0, len(rows), step):
        if arrow is None:
            digest.update(json.dumps(_slice(rows, start, start + step)).encode())
            continue
        table, sink = arrow[start : start + step].combine_chunks(), pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


class _Counter:
    """Tells a progress callback of every question and token."""

    def __init__(
        self, rows: Any, progress: Progress | None, *, kept: Sequence[int] = (), window: int = 0
    ) -> None:
        self._progress, self._started = progress, time.perf_counter()
        self._questions = self._tokens = self._resumed = 0
        if progress is None:
            return
        tokens = sequence_tokens(*question_lengths(rows))
        self._of = len(rows), int(tokens.sum())
        self._questions = sum(min(window, len(rows) - start) for start in kept)
        self._resumed = sum(int(tokens[start : start + window].sum()) for start in kept)
        self._tokens = self._resumed

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._progress is None:
            return
        self._questions += len(rows)
        for row in rows:
            prompt = len(row["prompt_ids"])
            self._tokens += sum(prompt + len(c) for c in row["completion_ids"])
        seconds = time.perf_counter() - self._started
        questions, tokens = self._of
        self._progress(
            Done(self._questions, questions, self._tokens, tokens, self._resumed, seconds)
        )


class _Parts:
    """Scores of whole windows in a folder, each file there whole or not at all."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        named = folder / "identity"
        if folder.is_dir():
            if not named.is_file() or named.read_text(encoding="utf-8") != identity:
                remove_directory(folder)
            else:
                remove_leftovers(folder)
        if not named.is_file():
            atomic_write_text(named, identity)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012d}.json"

    def has(self, start: int) -> bool:
        return self._path(start).is_file()

    def add(self, start: int, rows: Iterable[Row]) -> None:
        atomic_write_text(self._path(start), json.dumps(list(rows)))

    def read(self, start: int) -> list[Row]:
        rows: list[Row] = json.loads(self._path(start).read_text(encoding="utf-8"))
        return rows

    def remove(self) -> None:
        remove_directory(self.folder)


class _Scorer:
    """Scores windows of questions; all that does not change between them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        teachers: Sequence[str],
        thinking_ids: Sequence[int],
        config: CompactConfig | None,
        backend: CompactBackend | str,
        batch_tokens: int,
        share_prompts: bool,
    ) -> None:
        check_head(model)
        self.model, self.teachers, self.batch_tokens = model, list(teachers), batch_tokens
        # Weights do not depend on the consistency term, which costs products of its own.
        self.config = replace(config or CompactConfig(), consistency="off")
        self.collator = Collator.of(
            model,
            tokenizer,
            self.config,
            thinking_ids,
            share_prompts=share_prompts,
            lasting=False,
        )
        self.backend = backend

    def identity(self, rows: Any, window: int) -> str:
        """Everything that the scores depend on, as text."""
        tensors = {
            name: [list(p.shape), str(p.dtype), float(p.double().sum()), float(p.double().norm())]
            for name, p in self.model.state_dict().items()
        }
        settings = {
            "version": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "backend": choose(self.backend, run_spec(self.model)).backend.name,
            "config": asdict(self.config),
            "collator": asdict(self.collator),
            "teachers": self.teachers,
            "batch_tokens": self.batch_tokens,
            "window": window,
            "rows": [len(rows), _digest(rows, window)],
            "student": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
        }
        return json.dumps(settings, indent=1, sort_keys=True, default=str)

    def window(
        self,
        rows: Sequence[Mapping[str, Any]],
        count: _Counter,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Row]:
        """The rows of a window's questions, in order."""
        if batches is None:
            sizes, padded = self.collator.packing.sizes(*question_lengths(rows))
            batches = batches_within(sizes, self.batch_tokens, padded)
        found: dict[int, list[Row]] = {}
        for batch in batches:
            chosen = [rows[i] for i in batch]
            scored = self.score(chosen)
            found.update(zip(batch, scored, strict=True))
            count.add(chosen)
        for i in sorted(found):
            yield from found[i]

    @torch.no_grad()
    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Row]]:
        """The rows of each question of one batch."""
        model = self.model
        inputs = to_device(self.collator(rows), next(model.parameters()).device)
        with inference(model), lean_inference(model), heeding(model, self.collator.packing):
            out = compact_step(
                direct_body(model), model, inputs, config=self.config, backend=self.backend
            )
        return _rows_of(out, rows, self.teachers)


def _rows_of(
    out: CompactOutput, rows: Sequence[Mapping[str, Any]], teachers: Sequence[str]
) -> list[list[Row]]:
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
