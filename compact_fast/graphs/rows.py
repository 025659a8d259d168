"""Rows of files with rationales, one at a time, and what consensus needs of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class QuestionTexts(NamedTuple):
    """What consensus needs of one question."""

    id: str
    teachers: list[str]
    texts: list[str]
    answers: list[str | None] | None  # None: found in the texts
    gold: str | None
    place: str = ""  # "file:line", for messages

    def named(self, teacher: int | None = None) -> str:
        """Where it stands, its id, and one of its teachers."""
        place = f"{self.place}: " if self.place and self.place != self.id else ""
        who = "" if teacher is None else f", teacher {self.teachers[teacher]}"
        return f"{place}question {self.id}{who}"


class RowReader:
    """The rows of a .jsonl or .parquet file, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = self.share = 0.0
        """Of the file, 0 to 1: what was skipped; what has been read, with that."""

    def rows(self, skip: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, row) behind the first `skip` rows. Raises ValueError naming file and line, and
        where the file has no rows at all."""
        path, suffix = self.path, self.path.suffix.lower()
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if suffix == ".parquet":
            yield from self._parquet(skip)
        elif suffix in (".jsonl", ".ndjson"):
            yield from self._lines(skip)
        else:
            raise ValueError(f"{path}: expected a .jsonl or .parquet file, which can be streamed")

    def _parquet(self, skip: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = 0
        try:
            file = pq.ParquetFile(self.path)
            total = file.metadata.num_rows
            for batch in file.iter_batches(batch_size=1024):
                begin = min(max(skip - number, 0), batch.num_rows)
                number += begin
                if begin:
                    self.skipped = self.share = number / total
                for row in batch.slice(begin).to_pylist():
                    number += 1
                    self.share = number / total
                    yield f"{self.path}:row {number}", row
            if not number:
                raise ValueError(f"{self.path}: holds no rows")
        except pa.ArrowInvalid as error:
            place = f"{self.path}:row {number + 1}" if number else str(self.path)
            raise ValueError(f"{place}: is not valid parquet: {error}") from None

    def _lines(self, skip: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        size = self.path.stat().st_size
        behind, empty = 0, True
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                behind += len(line)
                if line.isspace():
                    continue
                empty = False
                if skip > 0:
                    skip -= 1
                    self.skipped = self.share = behind / size
                    continue
                place = f"{self.path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(_json_problem(line, place, error)) from None
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: expected a record of named fields")
                self.share = behind / size
                yield place, row
        if empty:
            raise ValueError(f"{self.path}: the file is empty")


def _json_problem(line: bytes, place: str, error: Exception) -> str:
    """What is wrong with a line, in the words of the other readers."""
    from compact_fast.data.files import parse_line  # seldom needed, and it brings all readers

    line = line.removesuffix(b"\n").removeprefix(b"\xef\xbb\xbf")
    return f"{place}: {parse_line(line, place).problem or f'is not valid JSON: {error}'}"


def question_texts(row: Mapping[str, Any], place: str) -> QuestionTexts:
    """The default `convert`. Raises ValueError naming place and field."""
    if "CoT" in row:
        texts = row["CoT"]
        if not isinstance(texts, (list, tuple, np.ndarray)):
            raise ValueError(f"{place}: CoT: expected a list, got {type(texts).__name__}")
        teachers, answers = [f"teacher-{k}" for k in range(len(texts))], None
        gold = row.get("Answer")
    else:
        rationales = row.get("rationales")
        if not isinstance(rationales, (list, tuple, np.ndarray)):
            raise ValueError(
                f"{place}: rationales: expected a list, got {type(rationales).__name__}"
            )
        for k, rationale in enumerate(rationales):
            if not isinstance(rationale, Mapping) or "text" not in rationale:
                raise ValueError(f"{place}: rationales[{k}].text: is missing")
        texts = [r["text"] for r in rationales]
        teachers = [str(r.get("teacher", f"teacher-{k}")) for k, r in enumerate(rationales)]
        known = any("answer" in r for r in rationales)
        answers = [r.get("answer") for r in rationales] if known else None
        gold = row.get("answer")
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{place}: rationale {k}: expected text, got {type(text).__name__}")
    if answers is not None:
        answers = [
            _answer_text(a, f"{place}: rationales[{k}].answer") for k, a in enumerate(answers)
        ]
    name = row.get("id")
    return QuestionTexts(
        place if name is None else str(name),
        teachers,
        list(texts),
        answers,
        _answer_text(gold, f"{place}: answer"),
        place,
    )


def _answer_text(answer: object, place: str) -> str | None:
    """A final answer as text. NaN, which tables put where nothing is, would pass for an answer that
    teachers share."""
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, (int, float, np.number, np.bool_)) and np.isfinite(answer):
        return str(answer)
    raise ValueError(f"{place}: expected text, a finite number or null, got {answer!r:.80}")
