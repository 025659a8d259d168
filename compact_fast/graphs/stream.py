"""Consensus of files larger than memory: JSONL or parquet in, parquet out, resumable.

While it runs, `OUTPUT.parts/` holds finished chunks, each written whole or not at all; a run that
was killed goes on behind the last of them. At the end they become one file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compact_fast.atomic import atomic_file, atomic_write_text
from compact_fast.graphs.limits import limits_sentence, stand_ins
from compact_fast.graphs.native import Backend
from compact_fast.graphs.options import ANSWER_NONE, Centrality, GraphOptions, Mode
from compact_fast.graphs.parsing import BeyondLimitsError, answer_keys, parse_rationales
from compact_fast.graphs.rows import QuestionTexts, RowReader, question_texts
from compact_fast.graphs.scoring import ConsensusResult, consensus

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("teachers", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),  # consensus of each rationale, 0 to 1
        ("agreement", pa.list_(pa.float64())),  # K * K, row by row
        ("groups", pa.list_(pa.int32())),  # equal numbers: near-identical texts, one vote
        # final answer (found in the text where none is given) equals the gold one: 1, 0, -1 unknown
        ("right", pa.list_(pa.int8())),
        ("no_evidence", pa.bool_()),
        ("undecidable", pa.bool_()),
        # too long for a step graph: compared by its final answer alone
        ("answer_only", pa.list_(pa.bool_())),
    ]
)


_COUNTED = re.compile(r"question (?P<q>\d+), teacher (?P<k>\d+): (?:(?:text|final answer) \d+: )?")

Convert = Callable[[Mapping[str, Any], str], QuestionTexts]


@dataclass
class TeacherFigures:
    """One teacher over the whole file."""

    teacher: str
    rationales: int = 0
    mean_score: float = 0.0
    mean_agreement: float = 0.0  # with the other teachers of its questions
    share_copied: float = 0.0  # texts that share a vote with another teacher's
    share_filtered: float = 0.0  # scores below `filter_below` of the question's largest
    share_right: float | None = None  # of final answers that could be compared to a gold answer


@dataclass
class StreamReport:
    """What `score_file` did."""

    questions: int
    resumed_at: int  # questions that an earlier run had already done
    no_evidence: int
    undecidable: int
    teachers: list[TeacherFigures]
    answer_only: int = 0  # rationales too long for a step graph, compared by their answers alone
    answer_only_places: list[str] = field(default_factory=list)  # those of this run


def score_file(
    source: str | Path,
    output: str | Path,
    *,
    convert: Convert | None = None,
    options: GraphOptions | None = None,
    mode: Mode = "relaxed",
    centrality: Centrality = "coverage",
    backend: Backend = "auto",
    threads: int | None = None,
    chunk_questions: int = 4096,
    filter_below: float = 0.8,
    on_progress: Callable[[int, float], None] | None = None,
) -> StreamReport:
    """Score every question of `source` (.jsonl or .parquet) into the parquet file `output`.

    `convert(row, place)` makes a row into QuestionTexts; the default reads
    {"rationales": [{"teacher", "text", "answer"?}], "answer"?, "id"?} and the authors'
    {"Question", "CoT", "Answer"}. `on_progress` gets the number of questions done so far, those
    of an interrupted run included (with them it starts), and the share of the input that they are.
    Memory holds two chunks of questions, whatever the file's size. Rows come out in the order of
    the file.

    Raises ValueError naming file, line and field for rows that cannot be read, and where
    `OUTPUT.parts` belongs to another input or other options.
    """
    source, output = Path(source), Path(output)
    options = options or GraphOptions()
    parts = output.with_name(output.name + ".parts")
    state = _state(source, options, mode, centrality, chunk_questions)
    done = _begin(parts, state)
    reader = RowReader(source)
    rows = reader.rows(done * chunk_questions)
    to_texts = convert or question_texts

    def score(chunk: list[QuestionTexts], number: int) -> int:
        table = score_questions(
            chunk,
            options=options,
            mode=mode,
            centrality=centrality,
            backend=backend,
            threads=threads,
        )
        with atomic_file(parts / f"part-{number:08}.parquet") as temporary:
            pq.write_table(table, temporary)
        beyond.extend(_answer_only(chunk, table))
        return len(chunk)

    beyond: list[str] = []
    finished = done * chunk_questions
    share: float | None = None
    pending: Future[int] | None = None
    with ThreadPoolExecutor(1) as worker:  # scores one chunk while the next is read
        for number in range(done, 1 << 62):
            chunk = [to_texts(row, place) for place, row in islice(rows, chunk_questions)]
            if pending is not None:
                finished += pending.result()
                pending = None
            if on_progress is not None:
                on_progress(finished, reader.skipped if share is None else share)
            if not chunk:
                break
            pending, share = worker.submit(score, chunk, number), reader.share
    report = _merge(parts, output, filter_below)
    report.resumed_at = min(done * chunk_questions, report.questions)
    report.answer_only_places = beyond
    shutil.rmtree(parts)
    return report


def score_questions(
    chunk: Sequence[QuestionTexts],
    *,
    options: GraphOptions | None = None,
    mode: Mode = "relaxed",
    centrality: Centrality = "coverage",
    backend: Backend = "auto",
    threads: int | None = None,
) -> pa.Table:
    """Some questions' consensus as a table of SCHEMA. Where a question gives no final answers, they
    are found in its texts. A text too long for a step graph is compared by its answer alone."""
    choices: dict[str, Any] = {
        "options": options, "mode": mode, "centrality": centrality, "backend": backend,
        "threads": threads,
    }  # fmt: skip
    without = np.array([q.answers is None for q in chunk], dtype=bool)
    if without.any() and not without.all():
        order = np.argsort(without, kind="stable")
        kinds = ([q for q in chunk if (q.answers is None) is found] for found in (False, True))
        tables = pa.concat_tables([score_questions(kind, **choices) for kind in kinds])
        return tables.take(np.argsort(order))
    sizes = [len(q.texts) for q in chunk]
    cu = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    texts = [text for q in chunk for text in q.texts]
    answers = None if without.any() else [a for q in chunk for a in q.answers or ()]
    beyond = np.zeros(len(texts), dtype=bool)
    try:
        found = _consensus(chunk, texts, cu, answers, choices)
    except BeyondLimitsError:
        texts, places = stand_ins(
            texts, find_answers=answers is None, options=options, backend=backend
        )
        beyond[places] = True
        found = _consensus(chunk, texts, cu, answers, choices)
    right = np.full(len(texts), -1, dtype=np.int8)
    gold, stated = answer_keys([q.gold for q in chunk], backend)
    if stated.any():
        if answers is not None:
            mine, known = answer_keys(answers, backend)
        else:
            graphs = parse_rationales(texts, options=options, backend=backend, threads=threads)
            mine, known = graphs.answer, graphs.answer_kind != ANSWER_NONE
        gold, stated = np.repeat(gold, sizes), np.repeat(stated, sizes)
        right[stated] = (known & (mine == gold))[stated]

    def lists(values: Any, bounds: Any) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(values))

    squares = np.concatenate([[0], np.cumsum(np.array(sizes) ** 2)]).astype(np.int64)
    flat = [m.ravel() for m in found.agreement]
    return pa.Table.from_arrays(
        [
            pa.array([q.id for q in chunk], pa.string()),
            pa.array([q.teachers for q in chunk], pa.list_(pa.string())),
            lists(found.scores, cu),
            lists(np.concatenate([np.zeros(0), *flat]), squares),
            lists(found.groups, cu),
            lists(right, cu),
            pa.array(found.no_evidence),
            pa.array(found.undecidable),
            lists(beyond, cu),
        ],
        schema=SCHEMA,
    )


def _consensus(
    chunk: Sequence[QuestionTexts], texts: list[str], cu: Any, answers: Any, choices: dict[str, Any]
) -> ConsensusResult:
    """`consensus`, whose messages name questions and teachers instead of counting in this chunk."""
    try:
        return consensus(texts, cu, final_answers=answers, **choices)
    except BeyondLimitsError:
        raise
    except ValueError as error:  # "question 7, teacher 1: text 30: ..."
        found = _COUNTED.match(str(error))
        if found is None:
            raise
        named = chunk[int(found["q"])].named(int(found["k"]))
        raise ValueError(f"{named}: {str(error)[found.end() :]}") from None


def _answer_only(chunk: Sequence[QuestionTexts], table: pa.Table) -> list[str]:
    """The rationales that were compared by their answers alone, by name."""
    column = table["answer_only"].combine_chunks()
    if not np.any(column.flatten().to_numpy(zero_copy_only=False)):
        return []
    rows = zip(chunk, column.to_pylist(), strict=True)
    return [q.named(k) for q, flags in rows for k, flag in enumerate(flags) if flag]


def score_batch(batch: Any, **choices: Any) -> Any:
    """The same stage for engines that hand out batches: `datasets.map(score_batch, batched=True,
    num_proc=...)`, and Ray Data's `map_batches(score_batch, batch_format="pyarrow")`.

    `batch` is a mapping of columns (lists or arrays) or a pyarrow table, in the shape of the rows
    that `score_file` reads: "rationales" and, where there are any, "id" and "answer", or the
    authors' "CoT". What comes back is of the same kind: those columns, and "consensus" and
    "agreement", a list a question. Every batch is scored by one thread, for the engine has the
    others. Raises ValueError as `score_file` does.
    """
    if isinstance(batch, pa.Table):
        rows = batch.to_pylist()
    else:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch: expected a mapping of columns or a table, got {type(batch).__name__}"
            )
        columns = {name: list(column) for name, column in batch.items()}
        if len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            raise ValueError(f"batch: columns differ in length: {lengths}")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    chunk = [question_texts(row, f"row {i}") for i, row in enumerate(rows)]
    table = score_questions(chunk, **{"threads": 1, **choices})
    if beyond := _answer_only(chunk, table):
        logger.warning("%s", limits_sentence(beyond, choices.get("options")))
    scores, agreement = table["scores"], table["agreement"]
    if isinstance(batch, pa.Table):
        return batch.append_column("consensus", scores).append_column("agreement", agreement)
    return {**columns, "consensus": scores.to_pylist(), "agreement": agreement.to_pylist()}


# ---- state and end -----------------------------------------------------------------------------


def _state(source: Path, options: GraphOptions, *choices: Any) -> dict[str, Any]:
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    stat = source.stat()
    start = hashlib.sha256()
    with source.open("rb") as file:
        start.update(file.read(1 << 20))
    return {
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "start": start.hexdigest(),
        "options": json.loads(json.dumps(asdict(options))),
        "choices": list(choices),
        "columns": SCHEMA.names,
    }


def _begin(parts: Path, state: dict[str, Any]) -> int:
    """Number of chunks that are already done."""
    file = parts / "state.json"
    done = _done(parts)
    known = json.loads(file.read_text()) if file.exists() else None
    if known is not None and known != state and done:
        changed = ", ".join(k for k in state if known.get(k) != state[k])
        raise ValueError(
            f"{parts}: was begun with another input or other options ({changed}); remove the "
            "folder to start anew"
        )
    if known != state:  # what has no finished part is no loss
        parts.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(state))
    return done


def _done(parts: Path) -> int:
    """Chunks that lie there finished."""
    done = 0
    while (parts / f"part-{done:08}.parquet").exists():
        done += 1
    return done


def _merge(parts: Path, output: Path, filter_below: float) -> StreamReport:
    sums: dict[str, np.ndarray[Any, Any]] = {}
    questions = no_evidence = undecidable = answer_only = 0
    with atomic_file(output) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for path in sorted(parts.glob("part-*.parquet")):
            table = pq.read_table(path, schema=SCHEMA)
            writer.write_table(table)
            questions += table.num_rows
            no_evidence += int(np.sum(table["no_evidence"].to_numpy()))
            undecidable += int(np.sum(table["undecidable"].to_numpy()))
            flags = table["answer_only"].combine_chunks().flatten()
            answer_only += int(np.sum(flags.to_numpy(zero_copy_only=False)))
            _add(sums, table, filter_below)
    return StreamReport(questions, 0, no_evidence, undecidable, _figures(sums), answer_only)


def _add(sums: dict[str, Any], table: pa.Table, filter_below: float) -> None:
    table = table.combine_chunks()
    sizes = table["teachers"].combine_chunks().value_lengths().to_numpy()
    if not sizes.sum():
        return

    def flat(name: str) -> Any:
        return table[name].combine_chunks().flatten()

    teachers = flat("teachers").dictionary_encode()
    scores, groups, right = (flat(name).to_numpy() for name in ("scores", "groups", "right"))
    starts = np.cumsum(sizes) - sizes
    others = np.repeat(sizes, sizes) - 1  # of each rationale, as all below
    rows = np.cumsum(others + 1) - others - 1  # where its line of the agreement begins
    largest = np.repeat(np.maximum.reduceat(scores, starts[sizes > 0]), sizes[sizes > 0])
    votes = np.repeat(starts, sizes) + groups
    figures = (
        np.ones(scores.size),
        scores,
        np.add.reduceat(flat("agreement").to_numpy(), rows) - 1,  # without itself
        others,
        np.bincount(votes)[votes] > 1,
        scores < filter_below * largest,
        right == 1,
        right >= 0,
    )
    codes = teachers.indices.to_numpy()
    lines = np.stack([np.bincount(codes, figure) for figure in figures], axis=1)
    for teacher, line in zip(teachers.dictionary.to_pylist(), lines, strict=True):
        sums[teacher] = sums.get(teacher, 0.0) + line


def _figures(sums: Mapping[str, Any]) -> list[TeacherFigures]:
    figures = []
    for teacher, line in sums.items():
        count, score, agreement, others, copied, filtered, right, known = line.tolist()
        figures.append(
            TeacherFigures(
                teacher,
                int(count),
                mean_score=score / count,
                mean_agreement=agreement / max(others, 1),
                share_copied=copied / count,
                share_filtered=filtered / count,
                share_right=right / known if known else None,
            )
        )
    return figures


def resumable(output: str | os.PathLike[str]) -> bool:
    """Would `score_file` go on with an earlier run?"""
    output = Path(output)
    parts = output.with_name(output.name + ".parts")
    return (parts / "state.json").exists() and _done(parts) > 0
