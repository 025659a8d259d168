"""Every command through its real entry point, on data small enough for seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from compact_fast.cli.main import main

SMALL = (
    *("--no-lora", "--learning-rate", "1e-3", "--questions-per-step", "2"),
    *("--gradient-accumulation-steps", "2", "--max-steps", "4", "--logging-steps", "1"),
    *("--world-questions", "40", "--eval-questions", "8", "--max-new-tokens", "12"),
)


@pytest.fixture(scope="module")
def trained(command, tiny_student, tmp_path_factory):
    """The folder of a finished run on the built-in world, and what the command printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    done = command(
        *("train", "--student", tiny_student, "--data", "arithmetic", *SMALL),
        *("--output-dir", folder, "--save-steps", "2"),
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_train_tells_its_story(trained):
    folder, done = trained
    for word in ("Data", "Student", "Tokens", "Consensus", "Method", "Backend", "Steps"):
        assert any(line.startswith(word) for line in done.stdout.splitlines()), word
    assert "4 of 4 questions" in done.stdout
    for teacher in ("strong", "terse", "verbose", "misleading", "misled"):
        assert done.stdout.count(f"\n  {teacher} ") == 2  # what it knows; what it weighed
        assert f"rationale NLL, {teacher}" in done.stdout
    assert str(folder / "model") in done.stdout
    assert "Traceback" not in done.stderr


def test_train_leaves_a_whole_run(trained):
    folder, _ = trained
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["config"]["learning_rate"] == 1e-3
    assert info["config"]["filter_below"] == 0.8
    assert info["consensus_backend"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    weights = [steps[0][f"teacher/{name}/weight"] for name in info["teachers"]]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    agreement = json.loads((folder / "agreement.json").read_text())
    assert agreement["teachers"] == info["teachers"]
    assert [row[i] for i, row in enumerate(agreement["counts"])] == [40] * 5
    assert 0 < agreement["share_right"]["misleading"] < agreement["share_right"]["strong"]
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["before"]["exact_match"]["questions"] == 8
    assert measured["after"]["rationale_nll"]["nll"] < measured["before"]["rationale_nll"]["nll"]
    for name in ("model/model.safetensors", "model/tokenizer.json", "report/index.html"):
        assert (folder / name).is_file(), name
    assert (folder / "checkpoint-4" / "manifest.json").is_file()


def test_score_writes_a_row_a_rationale(command, tiny_student, tmp_path):
    import pyarrow.parquet as pq

    target = tmp_path / "scores.parquet"
    done = command(
        *("score", "arithmetic", "--student", tiny_student, "-o", target),
        *("--world-questions", "40"),
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(target).to_pylist()
    assert len(table) == 200
    totals: dict[str, float] = {}
    for row in table:
        totals[row["id"]] = totals.get(row["id"], 0.0) + row["weight"]
    assert all(total == pytest.approx(1, abs=1e-5) for total in totals.values())
    assert "misleading" in done.stdout
    assert f"Wrote {target}" in done.stdout


def test_eval_measures_a_trained_model(trained, command, tmp_path):
    folder, _ = trained
    text = tmp_path / "text.txt"
    text.write_text("Ann has 3 apples. On Monday she finds 4 apples. " * 5)
    done = command(
        *("eval", "--student", folder / "model", "--data", "arithmetic", "--eval-questions", "8"),
        *("--max-new-tokens", "12", "--forget", text, "-o", tmp_path / "e.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    after = json.loads((folder / "evaluation.json").read_text())["after"]
    assert found["exact_match"]["right"] == after["exact_match"]["right"]
    assert found["perplexity"]["perplexity"] > 1
    assert set(found["rationale_nll"]["teachers"]) == {
        "strong",
        "terse",
        "verbose",
        "misleading",
        "misled",
    }
    assert "text perplexity" in done.stdout


def test_report_is_remade_and_runs_are_compared(trained, command, tmp_path):
    folder, _ = trained
    (folder / "report" / "index.html").unlink()
    done = command("report", folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "report" / "index.html").read_text()
    assert "misleading" in page
    assert done.stdout.strip().endswith("index.html")


def test_consensus_needs_no_student(command, rationales, tmp_path):
    import pyarrow.parquet as pq

    target = tmp_path / "agreement.parquet"
    done = command("consensus", rationales, "-o", target)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(target).to_pylist()
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(6)]
    assert rows[0]["teachers"] == ["ada", "bob"]
    assert "6 questions" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ada", "6"] in [line[:2] for line in lines]
    picture = tmp_path / "q1.png"
    done = command("consensus", rationales, "--explain", "q1", "-o", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "ada" in done.stdout
    assert "3 = 4" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}"], "--output: missing"),
        (["{file}", "-o", "x.csv"], "ends in .parquet"),
        (["{file}", "--explain", "q1x"], "has no question 'q1x'; did you mean q1?"),
        (["{file}", "-o", "x.parquet", "--threads", "many"], "--threads: expected a whole number"),
        (["{file}.jsonl", "-o", "x.parquet"], "no such file"),
        (["{file}", "-o", "x.parquet", "--tau", "1"], "--tau: unknown option"),
    ],
)
def test_consensus_refuses(words, message, rationales, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["consensus", *(w.format(file=rationales) for w in words)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [rationales.name]


def test_report_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds neither run.json nor metrics.jsonl" in capsys.readouterr().err


def test_check_forecasts_and_writes_nothing(command, tiny_student, rationales, tmp_path):
    config = tmp_path / "run.yaml"
    made = command("init", config, "--student", tiny_student, "--data", rationales)
    assert made.returncode == 0, made.stderr
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    done = command("check", config, "--output-dir", out, "--num-train-epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert "5 questions, 1 held out" in done.stdout
    assert "Forecast (nothing was trained or written)" in done.stdout
    rows = {k.strip(): v for k, _, v in map(_two, done.stdout.splitlines()) if v}
    assert rows["optimizer steps"] == "4"  # 5 questions, 4 a step: 2 steps an epoch
    assert re.fullmatch(r"\d+ MB +\d+ MB", rows["at the peak"])  # packed, per_teacher
    assert "bob" in done.stdout
    assert "66.7 %" in done.stdout or "50.0 %" in done.stdout


def _two(line: str) -> tuple[str, str, str]:
    name, gap, value = line.strip().partition("  ")
    return name, gap, value.strip()


def test_env_names_versions_and_backends(command):
    done = command("env")
    assert done.returncode == 0, done.stderr
    import torch

    assert torch.__version__ in done.stdout
    for word in ("native module", "backend torch", "backend taken", "transformers", "device"):
        assert word in done.stdout


def test_an_error_is_one_line_and_exit_code_2(command, tmp_path):
    done = command("train", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"compact-fast: error: {tmp_path / 'none.yaml'}: no such file\n"
    assert Path(tmp_path).is_dir()
