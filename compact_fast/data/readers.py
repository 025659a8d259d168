"""Questions from any supported file, folder or hub dataset, validated row by row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from compact_fast.atomic import atomic_write_text
from compact_fast.data.extract import answers_equal, extract_answer
from compact_fast.data.files import RawRow, raw_rows
from compact_fast.data.records import Question
from compact_fast.data.shapes import group_key, parse_row

# How many faults an error message spells out.
_NAMED = 3


class Questions(list[Question]):
    """What `read_questions` returns: a list that also knows what was left out."""

    rows: int = 0
    """Rows read."""
    skipped: int = 0
    """Rows left out because of a fault (on_error="skip")."""
    problems: list[str]
    """Every fault, "file:line:field: what"."""

    def __init__(self, questions: Iterable[Question] = ()) -> None:
        super().__init__(questions)
        self.problems = []


def read_questions(
    source: str | Path,
    *,
    split: str = "train",
    on_error: Literal["strict", "skip"] = "strict",
    quarantine: str | Path | None = None,
    limit: int | None = None,
    need_rationales: bool = True,
) -> Questions:
    """Read questions with their teachers' rationales.

    `source` is a JSON Lines, JSON, CSV, TSV or parquet file, the folder of a saved dataset, or a
    dataset on the hub, of which `split` is read; the shape of the records (`shapes.SHAPES`) is
    recognised row by row. Each rationale's final answer is extracted and compared with the gold
    one where the file does not say whether it is correct.

    on_error="strict" raises one ValueError that names the first faults and their number; "skip"
    leaves faulty rows out, counts them, and writes them with reasons to the JSON Lines file
    `quarantine` where one is given. `limit` reads no more than that many questions (all rows,
    where a row holds one completion, since any row may belong to an earlier question).
    `need_rationales` False also accepts questions without rationales, for evaluation.
    """
    if on_error not in ("strict", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected strict or skip")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}: expected at least 1")
    collected = _Collector(need_rationales)
    for raw in raw_rows(source, split):
        collected.add(raw)
        if limit is not None and not collected.partial and len(collected.questions) == limit:
            break
    if not collected.rows:
        raise ValueError(f"{source}: holds no rows")
    if on_error == "strict" and collected.faulty:
        raise ValueError(collected.message())
    if quarantine is not None and collected.faulty:
        atomic_write_text(quarantine, collected.quarantine())
    if not collected.questions:
        raise ValueError(f"{source}: no usable row; {collected.message()}")
    questions = Questions(list(collected.questions.values())[:limit])
    questions.rows = collected.rows
    questions.skipped = len(collected.faulty)
    questions.problems = [fault for _, faults in collected.faulty for fault in faults]
    _finish(questions)
    return questions


class _Collector:
    """Gathers rows into questions; rows with one completion join their question."""

    def __init__(self, need_rationales: bool) -> None:
        self.need_rationales = need_rationales
        self.questions: dict[str, Question] = {}
        self.rows = 0
        self.partial = False
        self.faulty: list[tuple[RawRow, list[str]]] = []

    def add(self, raw: RawRow) -> None:
        self.rows += 1
        if raw.problem:
            self.faulty.append((raw, [f"{raw.place}: {raw.problem}"]))
            return
        parsed = parse_row(raw.value, raw.place, need_rationales=self.need_rationales)
        problems = parsed.problems
        if parsed.question:
            self.partial = self.partial or parsed.partial
            if not parsed.partial:
                key = f"id {parsed.question.id}" if parsed.question.id else f"row {self.rows}"
            else:
                key = group_key(parsed.question)
            known = self.questions.get(key)
            if known is None:
                self.questions[key] = parsed.question
            elif parsed.partial:
                problems = _join(known, parsed.question)
            else:
                problems = [("id", f"{known.id!r} occurs twice; first at {known.source}")]
        if problems:
            faults = [
                f"{raw.place}:{name}: {what}" if name else f"{raw.place}: {what}"
                for name, what in problems
            ]
            self.faulty.append((raw, faults))

    def message(self) -> str:
        faults = [fault for _, of_row in self.faulty for fault in of_row]
        named = "; ".join(faults[:_NAMED])
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        rows = "1 row is" if len(self.faulty) == 1 else f"{len(self.faulty)} rows are"
        return (
            f"{named}{more} ({rows} faulty of {self.rows} read; mend them, or leave them out "
            "with on_error=skip)"
        )

    def quarantine(self) -> str:
        lines = [
            json.dumps({"place": raw.place, "problems": faults, "row": raw.value}, default=str)
            for raw, faults in self.faulty
        ]
        return "\n".join(lines) + "\n"


def _join(known: Question, more: Question) -> list[tuple[str, str]]:
    """Add another teacher's completion to a question; what contradicts it is returned."""
    if (known.question, known.messages) != (more.question, more.messages):
        return [("id", f"{known.id!r} has another prompt at {known.source}")]
    if not answers_equal(known.answer, more.answer, known.choices):
        return [("answer", f"{more.answer!r}, but {known.answer!r} at {known.source}")]
    names = {r.teacher for r in known.rationales}
    for rationale in more.rationales:
        if rationale.teacher in names:
            return [
                ("teacher", f"{rationale.teacher!r} occurs twice in the question of {known.source}")
            ]
    known.rationales.extend(more.rationales)
    return []


def _finish(questions: Questions) -> None:
    """Ids where there were none; what each rationale answers and whether that is right."""
    taken = Counter(q.id for q in questions if q.id)
    for number, question in enumerate(questions):
        if not question.id:
            question.id = f"q{number}"
            while question.id in taken:
                question.id = f"_{question.id}"
        for r in question.rationales:
            if r.correct is not None:
                continue
            if r.answer is None:
                r.answer = extract_answer(r.text, question.choices)
            if r.answer is not None:
                r.correct = answers_equal(r.answer, question.answer, question.choices)
