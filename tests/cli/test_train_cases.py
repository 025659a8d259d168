"""What the commands refuse and how a run goes on; in this process, for speed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from compact_fast.cli.main import main

FEW = (
    *("--no-lora", "--learning-rate", "1e-3", "--gradient-accumulation-steps", "1"),
    *("--questions-per-step", "2", "--max-steps", "2", "--logging-steps", "1", "--holdout", "0"),
)


@pytest.fixture
def go(tiny_student, tmp_path, monkeypatch, capsys):
    """Runs a command line; gives exit code, stdout, stderr."""
    monkeypatch.setenv("COMPACT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    # pictures take seconds a run; test_commands.py makes real ones
    for name in ("write_report", "write_comparison"):
        monkeypatch.setattr(f"compact_fast.report.{name}", _no_pictures, raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def _no_pictures(run: object, *target: object, **options: object) -> Path:
    return Path("report") / "index.html"


@pytest.fixture
def train(go, tiny_student, rationales, tmp_path):
    def run(*words: object, data: object = rationales, student: str = tiny_student):
        base = ("train", "--student", student, "--data", data, *FEW)
        return go(*base, "--output-dir", tmp_path / "run", *words)

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("compact-fast: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0]


# ---- what is refused -------------------------------------------------------------------------


def test_missing_data_file(train, tmp_path):
    refused(train(data=tmp_path / "rationale.jsonl"), "rationale.jsonl", "did you mean")


def test_empty_data(train, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    refused(train(data=tmp_path / "empty.jsonl"), "empty.jsonl")


def test_broken_record_names_file_line_and_field(train, tmp_path, rationales):
    lines = rationales.read_text().splitlines()
    row = json.loads(lines[2])
    del row["answer"]
    lines[2] = json.dumps(row)
    rationales.write_text("\n".join(lines) + "\n")
    refused(train(), "rationales.jsonl:3", "answer", "on_error=skip")
    code, out, _ = train("--on-error", "skip")
    assert code == 0
    assert "1 broken record left out" in out
    (left_out,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(left_out)["row"]["id"] == "q2"


def test_unknown_model_id(train, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for retries
    refused(train(student="nobody/no-such-model"), "nobody/no-such-model", "hub")


def test_student_folder_without_a_model(train, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(train(student=str(tmp_path / "empty")), "config.json")


def test_unset_student_and_unset_data(go, rationales):
    refused(go("train", "--data", rationales), "student: not set")
    refused(go("check", "--student", "x"), "data: not set")


def test_unknown_teacher(train):
    refused(train("--teachers", "ada,bop"), "'bop'", "did you mean bob?")


def test_fixed_weights_of_another_number(train):
    refused(train("--weighting", "1,2,3"), "3 weights for 2 teachers (ada, bob)")


def test_unknown_backend(train):
    refused(train("--backend", "cuda"), "backend='cuda'", "torch")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--backend", "foo"), ("backend='foo'", "torch")),
        (("--eval-data", "./none.jsonl"), ("none.jsonl", "no such file")),
        (("--forget-text", "none.txt"), ("none.txt",)),
    ],
)
def test_what_is_absent_is_refused_before_anything_is_read(go, train, monkeypatch, words, parts):
    def read(*args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr("compact_fast.pipeline.corpus.read_corpus", read)
    refused(train(*words), *parts)


def test_eval_refuses_an_unknown_backend_before_the_student(go, rationales):
    refused(
        go("eval", "--student", "no/such", "--data", rationales, "--backend", "foo"),
        "backend='foo'",
    )


def test_what_transformers_refuses_gains_the_key(train):
    refused(train("--lr-scheduler-type", "linaer"), "--lr-scheduler-type: linaer is not a valid")
    refused(train("--optim", "adamx"), "--optim: adamx is not a valid")
    refused(train("--deepspeed", "x.json"), "deepspeed='x.json'")
    refused(train("--label-names", "x", "--report-to", "wandb"), "report_to='wandb'")


def test_check_reads_what_would_be_evaluated(go, tiny_student, rationales, tmp_path):
    words = ("check", "--student", tiny_student, "--data", rationales, "--forget-text")
    refused(go(*words, tmp_path / "none.txt"), "none.txt")
    (tmp_path / "text.txt").write_text("some text to remember")
    code, out, err = go(*words, tmp_path / "text.txt", "--eval-data", rationales)
    assert code == 0, err
    assert "Evaluate   6 questions of" in out
    assert "perplexity of" in out


def test_check_counts_a_prompt_with_each_of_its_rationales(go, tiny_student, rationales):
    from transformers import AutoTokenizer

    from compact_fast.data import read_questions, tokenize_questions

    questions = list(read_questions(rationales))
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    rows = tokenize_questions(questions, tokenizer, teachers=["ada", "bob"]).rows
    prompts = sum(len(row["prompt_ids"]) for row in rows for _ in row["completion_ids"])
    tokens = prompts + sum(len(c) for row in rows for c in row["completion_ids"])
    code, out, err = go("check", "--student", tiny_student, "--data", rationales)
    assert code == 0, err
    assert f"Tokens     {tokens:,} in" in out
    assert f"({100 * prompts / tokens:.1f} % prompt)" in out


def test_too_short_for_any_rationale(train):
    refused(train("--max-length", "4"), "max_length")


def test_out_of_disk(train, monkeypatch, tmp_path):
    import os

    real = os.fsync

    def full(handle):
        if "checkpoint-2" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("os.fsync", full)
    refused(train(), "no space left on the disk")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr("os.fsync", real)
    code, _, err = train()
    assert code == 0, err


def test_a_loss_that_is_not_finite_stops_before_the_update(train, tmp_path):
    refused(
        train("--learning-rate", "1e30", "--max-steps", "4"), "step 2", "The update was not made"
    )
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"].startswith("stopped: ")
    assert not (tmp_path / "run" / "model").exists()


def test_interrupted_before_training(train, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("compact_fast.pipeline.corpus.read_corpus", interrupt)
    code, _, err = train()
    assert (code, err) == (130, "compact-fast: interrupted\n")


def test_score_and_eval_refuse(go, tiny_student, rationales, tmp_path):
    score = ("score", rationales, "--student", tiny_student)
    refused(go(*score), "--output: missing")
    refused(go(*score, "-o", tmp_path / "x.csv"), "ends in .parquet")
    refused(go("eval", "--student", tiny_student), "nothing to evaluate on")
    refused(go("eval", "--student", tiny_student, "--forget", tmp_path / "no.txt"), "no.txt")
    refused(go("report", tmp_path / "norun"), "norun: no such folder")


def test_eval_counts_questions_by_limit(go, tiny_student, rationales, tmp_path):
    few = ("--student", tiny_student, "--max-new-tokens", "2")
    code, out, err = go("eval", "--data", rationales, "--limit", "2", *few)
    assert code == 0, err
    assert "Questions  2 of " in out
    assert "trained" not in out
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {rationales}\nlimit: 1\n")
    assert "Questions  1 of " in go("eval", "--config", file, *few)[1]
    assert "Questions  3 of " in go("eval", "--config", file, "--limit", "3", *few)[1]
    assert "Questions  3 of " in go("eval", "--config", file, "--eval-questions", "3", *few)[1]
    # the file's limit is that of its training data
    assert "Questions  6 of " in go("eval", "--config", file, "--eval-data", rationales, *few)[1]
    both = ("--limit", "2", "--eval-questions", "3")
    refused(go("eval", "--data", rationales, *both, *few), "--limit=2 and --eval-questions=3")


# ---- a run's folder --------------------------------------------------------------------------


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(train, tmp_path):
    assert train()[0] == 0
    code, out, _ = train()
    assert code == 0
    assert "holds this very run, finished" in out
    model = tmp_path / "run" / "model" / "model.safetensors"
    first = model.read_bytes()
    code, out, err = train("--max-steps", "3")
    assert code == 0, err
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert model.read_bytes() != first


def test_what_was_trained_is_of_this_session(train):
    code, out, _ = train()
    assert code == 0
    assert "Trained    2 steps in " in out
    assert "resumed" not in out
    code, out, err = train("--max-steps", "3")
    assert code == 0, err
    assert "Trained    1 step in " in out
    assert " s a step; resumed at step 2, now at 3\n" in out
    code, out, err = train("--max-steps", "3", "--max-new-tokens", "4")
    assert code == 0, err
    assert "Trained    nothing: all 3 steps had been made before\n" in out


def test_a_finished_run_is_not_redone_for_another_way_to_watch_it(train, tmp_path):
    assert train()[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    code, out, _ = train("--progress", "none", "--logging-steps", "2")
    assert code == 0
    assert "holds this very run, finished" in out
    assert "Student" not in out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_another_run_in_the_same_folder_is_refused(train, tmp_path):
    assert train()[0] == 0
    (tmp_path / "run" / "mine.txt").write_text("keep")
    refused(train("--tau", "2"), "other settings", "tau: 1.0 there, 2.0 now", "--overwrite")
    refused(train("--resume", "never", "--max-steps", "3"), "holds a run")
    code, _, err = train("--tau", "2", "--overwrite")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["tau"] == 2
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"


def test_resume_from_a_named_checkpoint_that_is_damaged(train, tmp_path):
    assert train("--save-steps", "1")[0] == 0
    weights = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(train("--resume", weights.parent, "--max-steps", "3"), "checkpoint-1", "sha256")


# ---- the same bits ---------------------------------------------------------------------------


def test_the_same_command_gives_the_same_model(train, tmp_path):
    assert train()[0] == 0
    model = tmp_path / "run" / "model" / "model.safetensors"
    first = model.read_bytes()
    assert train("--overwrite")[0] == 0  # tokens and consensus now come from the cache
    assert model.read_bytes() == first


def test_a_stopped_run_goes_on_to_the_same_bits(train, tmp_path, monkeypatch):
    import compact_fast.trainer.trainer as trainer

    more = ("--max-steps", "4", "--eval-data", "arithmetic", "--eval-questions", "4")
    more = (*more, "--max-new-tokens", "4", "--samples", "1")
    assert train(*more)[0] == 0
    model = tmp_path / "run" / "model" / "model.safetensors"
    first = model.read_bytes()

    real, calls = trainer.compact_step, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "compact_step", step)
    code, _, err = train(*more, "--overwrite")
    assert code == 143
    assert "compact-fast: stopped by SIGTERM after step 2; checkpoint-2 is whole" in err
    assert "error" not in err
    assert "--debug" not in err
    assert not model.exists()
    code, out, err = train(*more)
    assert code == 0, err
    assert model.read_bytes() == first
    assert "Before " in out


def test_an_adapter_is_trained_saved_and_loaded(train, go, tmp_path, rationales):
    code, out, err = train("--lora", "--lora-targets", "q_proj,v_proj")
    assert code == 0, err
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    code, out, err = go(
        *("eval", "--student", tmp_path / "run" / "model", "--data", rationales),
        *("--max-new-tokens", "4"),
    )
    assert code == 0, err
    assert "rationale NLL, bob" in out


# ---- several weightings ----------------------------------------------------------------------


def test_compare_trains_each_weighting_and_prints_one_table(train, tmp_path):
    code, out, err = train(
        *("--compare", "uniform,single,correct", "--holdout", "0.2", "--eval-data", "arithmetic"),
        *("--eval-questions", "4", "--max-new-tokens", "4"),
    )
    assert code == 0, err
    last = out[out.rindex("weighting  ") :]
    for label in ("before training", "compact", "uniform", "single", "correct"):
        assert f"\n  {label} " in last
    runs = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "run").glob("*/run.json")}
    assert runs["uniform"]["config"]["weighting"] == "uniform"
    assert runs["uniform"]["config"]["filter_below"] == 0
    assert runs["compact"]["config"]["filter_below"] == 0.8
    assert runs["single"]["config"]["weighting"] == [1.0, 0.0]  # ada is always right
    befores = {
        json.dumps(json.loads(p.read_text())["before"])
        for p in (tmp_path / "run").glob("*/evaluation.json")
    }
    assert len(befores) == 1
    assert (
        "finished earlier"
        in train(
            *(
                "--compare",
                "uniform,single,correct",
                "--holdout",
                "0.2",
                "--eval-data",
                "arithmetic",
            ),
            *("--eval-questions", "4", "--max-new-tokens", "4"),
        )[1]
    )


def test_an_unset_output_is_the_default(go, tiny_student, rationales):
    code, _, err = go("train", "--student", tiny_student, "--data", rationales, *FEW)
    assert code == 0, err
    assert Path("runs/compact/run.json").is_file()


def test_bf16_needs_no_word_about_the_cpu(train, tmp_path):
    code, out, err = train("--bf16", "true")
    assert code == 0, err
    assert "Trained    2 steps" in out
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["bf16"] is True


# ---- rationales too long for a step graph ------------------------------------------------------


@pytest.fixture
def long_rationale(rationales) -> Path:
    """The third question's second teacher writes 513 steps."""
    rows = [json.loads(line) for line in rationales.read_text().splitlines()]
    text = rows[2]["rationales"][1]["text"]
    rows[2]["rationales"][1]["text"] = "2 + 1 = 3\n" * 513 + text
    rationales.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rationales


@pytest.mark.parametrize("words", [(), ("--mode", "paper"), ("--consensus", "none")])
def test_a_rationale_too_long_for_a_step_graph_is_said_and_trained_on(
    words, go, long_rationale, tiny_student
):
    more = ("--max-length", 9000, "--holdout", 0, "--lora", "false", *words)
    code, out, err = go("check", "--student", tiny_student, "--data", long_rationale, *more)
    assert code == 0, err
    said = [line for line in out.splitlines() if "compared by the final answer alone" in line]
    assert len(said) == 1
    assert "1 rationale has more than 512 steps" in said[0]
    assert said[0].endswith(f"{long_rationale}:3: question q2, teacher bob")
    assert "dropped" not in out


def test_a_dropped_rationale_is_not_made_into_a_graph(train, long_rationale, tmp_path):
    code, out, err = train(data=long_rationale)
    assert code == 0, err
    assert "1 rationale dropped (longer than max_length)" in out
    assert "final answer alone" not in out
    agreement = json.loads((tmp_path / "run" / "agreement.json").read_text())
    assert agreement["counts"] == [[6, 5], [5, 5]]
