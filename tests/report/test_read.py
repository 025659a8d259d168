import json

import pytest
from synthetic_run import FOUR, SHORT, make_run

from compact_fast.report.read import number, read_run


def test_a_whole_run_is_read_without_remarks(tmp_path):
    run = read_run(make_run(tmp_path / "r", FOUR, 10))
    assert run.notes == []
    assert run.teachers == FOUR
    assert len(run.train) == 10
    assert len(run.evaluations) == 5
    steps, values = run.series("teacher/gpt-4o/weight")
    assert steps == [float(s) for s in range(1, 11)]
    assert values == [row["teacher/gpt-4o/weight"] for row in run.train]
    assert run.series("eval_nll", run.evaluations)[1] == [1.2] * 5


def test_a_half_written_last_line_is_left_out_and_said(tmp_path):
    path = make_run(tmp_path / "r", SHORT, 10, status="running")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 0.')
    run = read_run(path)
    assert len(run.train) == 10
    assert run.notes == [
        "The last line of metrics.jsonl (line 16) is half written, as a killed run leaves it; it "
        "was left out."
    ]


def test_a_half_written_line_that_ends_in_a_byte_of_a_character(tmp_path):
    path = make_run(tmp_path / "r", SHORT, 3)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "ü'.encode()[:-1])
    run = read_run(path)
    assert len(run.train) == 3
    assert "half written" in run.notes[0]


def test_damage_inside_the_log_is_counted_by_line(tmp_path):
    path = make_run(tmp_path / "r", SHORT, 10)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[1], lines[3] = "{broken", '["no", "object"]'
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(path).notes == ["2 unreadable lines of metrics.jsonl (line 2, 4) left out."]


def test_rows_logged_again_after_a_resume_count_once(tmp_path):
    path = make_run(tmp_path / "r", SHORT, 4)
    with (path / "metrics.jsonl").open("a") as file:
        for step in (3, 4, 5):
            file.write(json.dumps({"step": step, "loss": 9.0}) + "\n")
    run = read_run(path)
    assert [row["step"] for row in run.train] == [1, 2, 3, 4, 5]
    assert run.series("loss")[1][2:] == [9.0, 9.0, 9.0]
    # Two training rows and the evaluations beside them.
    assert "The run was resumed: 4 rows" in run.notes[0]


def test_non_finite_and_null_values_are_gaps(tmp_path):
    path = make_run(tmp_path / "r", SHORT, 2)
    rows = '{"step": 3, "loss": NaN}\n{"step": 4, "loss": null}\n{"step": 5, "loss": 1.5}\n'
    with (path / "metrics.jsonl").open("a") as file:
        file.write(rows)
    run = read_run(path)
    assert run.series("loss")[0] == [1.0, 2.0, 5.0]
    assert number(True) is None
    assert number("1") is None


def test_teachers_are_found_in_the_log_when_run_json_is_lost(tmp_path):
    path = make_run(tmp_path / "r", ["org/model", "b"], 2)
    (path / "run.json").write_text("{not json")
    (path / "agreement.json").unlink()
    run = read_run(path)
    assert run.teachers == ["org/model", "b"]
    assert any(note.startswith("run.json could not be read") for note in run.notes)
    assert run.config == {}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such run directory"):
        read_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"neither run\.json nor metrics\.jsonl"):
        read_run(tmp_path)
