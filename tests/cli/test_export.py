"""`compact-fast export`: what it writes is the trained student, or it writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compact_fast.cli.main import main
from compact_fast.students import load_student

KEYS = {
    "student": "arithmetic",
    "data": "arithmetic",
    "world_questions": 60,
    "eval_questions": 0,
    "holdout": 0.0,
    "questions_per_step": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3,
    "max_steps": 3,
}


@pytest.fixture(scope="module")
def adapter_run(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    words = [f"--{key.replace('_', '-')}={value}" for key, value in KEYS.items()]
    done = command("train", *words, "--lora", "--lora-r=4", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def logits(folder: Path) -> torch.Tensor:
    student = load_student(str(folder), dtype="fp32")
    with torch.no_grad():
        return student.model(torch.arange(2, 40)[None]).logits


def test_merged_is_the_trained_student(command, adapter_run, tmp_path) -> None:
    done = command("export", adapter_run, "-o", tmp_path / "merged", "--merge")
    assert done.returncode == 0, done.stderr
    assert "adapter merged into arithmetic" in done.stdout
    assert "Compared" in done.stdout
    written = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= written
    assert not any("adapter" in name for name in written)
    trained, merged = logits(adapter_run / "model"), logits(tmp_path / "merged")
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-3)
    start = load_student("arithmetic").model(torch.arange(2, 40)[None]).logits.detach()
    assert float((trained - start).abs().max()) > 0.05  # else any base would have passed


def test_adapter_only_loads_on_its_base(adapter_run, tmp_path) -> None:
    assert main(["export", str(adapter_run), "--adapter-only", "-o", str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= written
    assert "model.safetensors" not in written
    assert torch.equal(logits(tmp_path / "out"), logits(adapter_run / "model"))


def test_a_checkpoint_serves_where_the_run_did_not_finish(adapter_run, tmp_path, capsys) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(adapter_run, unfinished)
    shutil.rmtree(unfinished / "model")
    words = ["export", str(unfinished), "--merge", "-o", str(tmp_path / "out"), "--dtype", "bf16"]
    assert main(words) == 0
    assert "checkpoint-3" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_fully_trained_student_is_written_as_it_is(tmp_path, capsys) -> None:
    student = load_student("arithmetic")
    with torch.no_grad():
        student.model.get_input_embeddings().weight += 0.1
    student.model.save_pretrained(tmp_path / "run" / "model")
    student.tokenizer.save_pretrained(tmp_path / "run" / "model")
    assert main(["export", str(tmp_path / "run"), "--merge", "-o", str(tmp_path / "out")]) == 0
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "run" / "model"))
    refused = ["export", str(tmp_path / "run"), "--adapter-only", "-o", str(tmp_path / "none")]
    assert main(refused) == 2
    assert "there is no adapter; use --merge" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_that_comes_back_different_is_not_written(adapter_run, tmp_path, monkeypatch):
    from compact_fast.pipeline import export

    def spoiled(model):
        model = model.merge_and_unload()
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] += 1.0
        return model

    monkeypatch.setattr(export, "merged", spoiled)
    target = tmp_path / "merged"
    with pytest.raises(ValueError, match=r"not written: loaded again, the model's logits differ"):
        export.export_merged(adapter_run / "model", str(target))
    assert not target.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--merge"], "--output: missing"),
        (["RUN", "-o", "new"], "one of them must be given"),
        (["RUN", "-o", "new", "--merge", "--adapter-only"], "exclude each other"),
        (["RUN", "-o", "new", "--adapter-only", "--dtype", "bf16"], "--dtype: an adapter"),
        (["RUN", "-o", "new", "--merge", "--dtype", "int8"], "'int8': expected fp32 or bf16"),
        (["RUN", "-o", ".", "--merge"], "--output: . exists"),
        (["nowhere", "-o", "new", "--merge"], "nowhere: no such folder"),
        (["EMPTY", "-o", "new", "--merge"], "neither a trained model nor a good checkpoint"),
    ],
)
def test_mistakes_end_in_one_line(adapter_run, tmp_path, monkeypatch, capsys, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    named = {"RUN": str(adapter_run), "EMPTY": "empty"}
    assert main(["export", *(named.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
