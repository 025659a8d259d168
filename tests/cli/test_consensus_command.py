"""What `compact-fast consensus` reads, and says on its way."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from compact_fast.cli.consensus import _ConsensusLine
from compact_fast.cli.main import main


def test_speed_and_time_left_leave_out_an_earlier_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = _ConsensusLine()
    line(100, 0.25)  # done before
    assert capsys.readouterr().err == ""  # no terminal: a line now and then
    line.start -= 10
    line.told -= 31
    line(300, 0.75)
    said = capsys.readouterr().err
    assert said == "consensus: 300 questions (75.0 % of the file), 20 a second, 5 s left\n"
    line(400, 1.0)
    assert capsys.readouterr().err == ""


def test_nothing_read_yet(capsys: pytest.CaptureFixture[str]) -> None:
    line = _ConsensusLine()
    line.told -= 31
    line(0, 0.0)
    assert capsys.readouterr().err == "consensus: 0 questions (0.0 % of the file), 0 a second\n"


def lists(**changes: object) -> str:
    row = {"id": "q", "prompt": "2 + 3?", "answer": "5", "teachers": ["ada", "bob"]}
    return json.dumps({**row, "completions": ["2 + 3 = 5", "2 + 3 = 6"], **changes}) + "\n"


def test_lists_of_completions(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lists() + lists(id="r", completions=["5", "5"]))
    assert main(["consensus", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "o.parquet")]) == 0
    rows = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["q", "r"]
    assert rows[0]["teachers"] == ["ada", "bob"]
    assert rows[0]["right"] == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lists(completions=["5"]), "in.jsonl:1:teachers: 2 names for 1 completions"),
        (
            json.dumps({"prompt": "?", "answer": "5", "teacher": "ada", "completion": "5"}),
            "in.jsonl:1:completion: one teacher's alone",
        ),
    ],
)
def test_rows_that_are_no_question(
    row: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(row)
    assert main(["consensus", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "o.parquet")]) == 2
    assert message in capsys.readouterr().err


def test_a_rationale_too_long_for_a_step_graph_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "2 + 3 = 5\n" * 600 + "The answer is 5."
    Path("in.jsonl").write_text(lists(completions=[long, "2 + 3 = 6"]) + lists(id="r"))
    said = "alone: in.jsonl:1: question q, teacher ada"
    assert main(["consensus", "in.jsonl", "-o", "o.parquet"]) == 0
    assert capsys.readouterr().out.count(said) == 1
    assert pq.read_table("o.parquet")["right"].to_pylist() == [[1, 0], [1, 0]]
    assert main(["consensus", "in.jsonl", "--explain", "q"]) == 0
    assert said in capsys.readouterr().out
