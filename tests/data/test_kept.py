from __future__ import annotations

import json
from pathlib import Path

import pytest

from compact_fast.data.kept import kept_questions
from compact_fast.data.readers import read_questions


def test_a_file_is_read_once_while_it_stays_the_same(tmp_path: Path) -> None:
    path, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    record = {
        "question": "How many? é\u2028",
        "answer": "4",
        "choices": None,
        "rationales": [
            {"teacher": "ann", "text": "2 + 2 = 4. The answer is 4"},
            {"teacher": "bob", "text": "No idea"},
        ],
    }
    path.write_text(json.dumps(record) + "\n")
    reads = []

    def read() -> tuple[list, int]:
        reads.append(1)
        found = read_questions(path)
        return list(found), found.skipped

    first = kept_questions(path, cache, {}, read)
    again = kept_questions(path, cache, {}, read)
    assert first == again
    assert [r.correct for r in again[0][0].rationales] == [True, None]
    assert len(reads) == 1
    assert kept_questions(path, None, {}, read) == first
    assert kept_questions(path, cache, {"limit": 1}, read) == first
    assert len(reads) == 3
    entries = list(cache.glob("*/questions.jsonl"))
    assert len(entries) == 2
    for kept in entries:
        kept.write_bytes(kept.read_bytes()[:-3])
    assert kept_questions(path, cache, {}, read) == first
    assert len(reads) == 4
    path.write_text(json.dumps({**record, "answer": "5"}) + "\n")
    assert kept_questions(path, cache, {}, read)[0][0].answer == "5"


def test_broken_records_are_told_of_every_time(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n")

    def read() -> tuple[list, int]:
        return [], 1

    assert kept_questions(path, tmp_path / "cache", {}, read) == ([], 1)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="no usable"):
        kept_questions(
            path, tmp_path / "cache", {}, lambda: (_ for _ in ()).throw(ValueError("no usable"))
        )
