"""Files of any size: the same scores as in memory, whole or not at all, resumed after a stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graph_support import needs_native

from compact_fast.data import read_questions
from compact_fast.graphs import GraphOptions, consensus
from compact_fast.graphs.limits import stand_ins
from compact_fast.graphs.stream import (
    resumable,
    score_batch,
    score_file,
)


def questions(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for q in range(count):
        a, b = rng.integers(2, 50, 2).tolist()
        rationales = []
        for k in range(q % 5 + 1):
            total = a + b if rng.random() < 0.6 else a + b + int(rng.integers(1, 9))
            rationales.append(
                {
                    "teacher": f"t{k}",
                    "text": f"{a} and {b} pens.\n{a} + {b} = {total}\n{total} * 2 = {2 * total}",
                    "answer": str(2 * total),
                }
            )
        rows.append({"id": f"q{q}", "answer": str(2 * (a + b)), "rationales": rationales})
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return questions(230)


@pytest.fixture
def source(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected(rows: list[dict[str, Any]]) -> list[list[float]]:
    flat = [r for row in rows for r in row["rationales"]]
    cu = np.cumsum([0] + [len(row["rationales"]) for row in rows])
    found = consensus([r["text"] for r in flat], cu, final_answers=[r["answer"] for r in flat])
    return [part.tolist() for part in np.split(found.scores, cu[1:-1])]


def check(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pq.read_table(path)
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    assert table["scores"].to_pylist() == expected(rows)
    for row, flat in zip(rows, table["agreement"].to_pylist(), strict=True):
        assert len(flat) == len(row["rationales"]) ** 2
    assert table["no_evidence"].to_pylist() == [len(row["rationales"]) < 2 for row in rows]


def test_file_equals_memory(source: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    report = score_file(
        source,
        tmp_path / "out.parquet",
        chunk_questions=50,
        on_progress=lambda *done: seen.append(done),
    )
    check(tmp_path / "out.parquet", rows)
    assert [done for done, _ in seen] == [0, 50, 100, 150, 200, 230]
    assert [seen[0][1], seen[-1][1]] == [0, 1]
    assert sorted(seen) == seen
    assert (report.questions, report.resumed_at) == (230, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]
    first = next(t for t in report.teachers if t.teacher == "t0")
    right = [row["rationales"][0]["answer"] == row["answer"] for row in rows]
    assert first.rationales == 230
    assert first.share_right == pytest.approx(np.mean(right))


def test_parquet_in_and_other_shapes(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    score_file(tmp_path / "in.parquet", tmp_path / "a.parquet")
    check(tmp_path / "a.parquet", rows)
    authors = [
        {"Question": "?", "CoT": [r["text"] for r in row["rationales"]], "Answer": row["answer"]}
        for row in rows
    ]
    (tmp_path / "authors.jsonl").write_text("\n".join(map(json.dumps, authors)))
    score_file(tmp_path / "authors.jsonl", tmp_path / "b.parquet")
    found, given = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ba")
    assert found["scores"].to_pylist() == expected(rows)
    assert found["right"].to_pylist() == given["right"].to_pylist()  # read from the texts


def test_questions_without_answers_among_others(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    mixed = [dict(row) for row in rows]
    for row in mixed[::3]:
        row["rationales"] = [{"text": r["text"], "teacher": "t"} for r in row["rationales"]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    for chunk in (50, 7):  # whatever is scored together
        score_file(tmp_path / "in.jsonl", tmp_path / "out.parquet", chunk_questions=chunk)
        check(tmp_path / "out.parquet", rows)  # the texts end in what was given as answer


def test_resumes_where_it_stopped(source: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"

    def stop(done: int, share: float) -> None:
        if done >= 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(source, out, chunk_questions=40, on_progress=stop)
    assert resumable(out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"begun with another input or other options \(options\)"):
        score_file(source, out, chunk_questions=40, options=GraphOptions(text=0.0))
    seen: list[tuple[int, float]] = []
    report = score_file(
        source, out, chunk_questions=40, on_progress=lambda *done: seen.append(done)
    )
    assert report.resumed_at >= 80
    first, share = seen[0]
    assert first == report.resumed_at
    assert share == pytest.approx(first / len(rows), abs=0.05)
    check(out, rows)
    assert not resumable(out)


@needs_native
def test_survives_kills(tmp_path: Path) -> None:
    rows = questions(3000)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = (
        "import sys, time\nfrom compact_fast.graphs.stream import score_file\n"
        f"score_file({str(source)!r}, {str(out)!r}, chunk_questions=100,"
        " on_progress=lambda *done: time.sleep(0.05))\n"
    )
    parts = out.with_name("out.parquet.parts")
    kills = 0
    for _ in range(3):
        before = len(list(parts.glob("part-*")))
        child = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 60
        while len(list(parts.glob("part-*"))) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        kills += child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert kills >= 2
    report = score_file(source, out, chunk_questions=100)
    assert report.resumed_at > 0
    check(out, rows)


BAD = [
    ("{", "in.jsonl:2: is not valid JSON: .* at column 2"),
    ('{"id": "x", "rationales": ', "in.jsonl:2: is not valid JSON: Expecting value at column 27"),
    ("[" * 100_000, "in.jsonl:2: is nested too deeply"),
    ("[1]", "in.jsonl:2: expected a record"),
    ('{"id": 1}', "in.jsonl:2: rationales: expected a list, got NoneType"),
    ('{"rationales": "text"}', "in.jsonl:2: rationales: expected a list, got str"),
    ('{"rationales": [{"teacher": "a"}]}', r"in.jsonl:2: rationales\[0\].text: is missing"),
    ('{"rationales": [{"text": 5}]}', "in.jsonl:2: rationale 0: expected text, got int"),
    (
        '{"id": "x", "rationales": [{"text": "\\ud800", "teacher": "t9", "answer": "1"}]}',
        "in.jsonl:2: question x, teacher t9: not valid Unicode at character 0",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_rows(line: str, message: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(rows[3]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        score_file(source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


LONG = "".join(f"{i} + 1 = {i + 1}\n" for i in range(600))


def long_row(**more: Any) -> dict[str, Any]:
    texts = [
        f"{LONG}The answer is 7.",
        "3 + 4 = 7. The answer is 7.",
        "4 * 2 = 8. The answer is 8.",
    ]
    rationales = [{"teacher": f"t{k}", "text": text} for k, text in enumerate(texts)]
    for rationale, answer in zip(rationales, more.pop("answers", []), strict=False):
        rationale["answer"] = answer
    return {"id": "x", "answer": "7", "rationales": rationales, **more}


@pytest.mark.parametrize("answers", [[], ["7", "7", "8"]])
@pytest.mark.parametrize("backend", ["rustworkx", pytest.param("native", marks=needs_native)])
def test_a_rationale_beyond_the_limits_counts_by_its_answer(
    answers: list[str], backend: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text(json.dumps(rows[3]) + "\n" + json.dumps(long_row(answers=answers)) + "\n")
    report = score_file(source, out, backend=backend)
    assert report.questions == 2
    assert report.answer_only == 1
    assert report.answer_only_places == [f"{source}:2: question x, teacher t0"]
    plain, found = pq.read_table(out).to_pylist()
    assert plain["answer_only"] == [False] * 4
    assert found["answer_only"] == [True, False, False]
    assert found["right"] == [1, 1, 0]
    # what a text without steps gets, its answer given
    texts = ["", *(r["text"] for r in long_row()["rationales"][1:])]
    same = consensus(texts, [0, 3], final_answers=["7", "7", "8"], backend=backend)
    assert found["scores"] == same.scores.tolist()
    assert found["scores"][0] > found["scores"][2]


def test_a_batch_names_what_is_beyond_the_limits(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("compact_fast").propagate = True
    with caplog.at_level(logging.WARNING):
        found = score_batch({name: [value] for name, value in long_row().items()})
    assert len(found["consensus"][0]) == 3
    assert "1 rationale has more than 512 steps" in caplog.text
    assert "row 0: question x, teacher t0" in caplog.text


@pytest.mark.parametrize("backend", ["rustworkx", pytest.param("native", marks=needs_native)])
def test_only_what_the_parser_refuses_is_stood_in_for(backend: Any) -> None:
    options = GraphOptions(max_steps=3, max_bytes=40)
    texts = ["1\n2\n3", "1\n2\n3\n4", "é" * 20, "é" * 21, "a" * 40, "=" * 41 + "\n#### 5", ""]
    found, places = stand_ins(texts, find_answers=True, options=options, backend=backend)
    assert places == [1, 3, 5]
    assert [found[s] for s in (0, 2, 4, 6)] == [texts[s] for s in (0, 2, 4, 6)]
    assert found[5] == "#### 5"
    assert stand_ins(texts, find_answers=False, options=options)[0][5] == ""


def test_a_broken_line_is_worded_as_the_other_readers_do(tmp_path: Path) -> None:
    for line in (b'{"id": \n', b'{"id": "\xff"}\n'):
        source = tmp_path / "in.jsonl"
        source.write_bytes(line)
        with pytest.raises(ValueError, match=r"line|JSON") as ours:
            score_file(source, tmp_path / "out.parquet")
        with pytest.raises(ValueError, match=r"line|JSON") as theirs:
            read_questions(source)
        assert str(theirs.value).startswith(str(ours.value))


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    for text in ("", "\n \n"):
        source.write_text(text)
        with pytest.raises(ValueError, match=r"in.jsonl: the file is empty"):
            score_file(source, out)
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in.parquet: holds no rows"):
        score_file(tmp_path / "in.parquet", out)
    assert not out.exists()


def test_a_mended_input_is_begun_anew(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text(json.dumps(rows[3]) + "\n{\n")
    with pytest.raises(ValueError, match=r"in.jsonl:2"):
        score_file(source, out)
    assert not resumable(out)
    source.write_text(json.dumps(rows[3]) + "\n")
    report = score_file(source, out)
    assert (report.questions, report.resumed_at) == (1, 0)
    assert not out.with_name("out.parquet.parts").exists()


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        score_file(tmp_path / "none.jsonl", tmp_path / "out.parquet")
    (tmp_path / "in.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"expected a \.jsonl or \.parquet file"):
        score_file(tmp_path / "in.csv", tmp_path / "out.parquet")
