"""The shipped launcher settings, as docs/training.md gives them, with two processes on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes want two GPUs")
def test_accelerate_launches_a_sharded_run(tiny_student, rationales, tmp_path) -> None:
    from compact_fast.students import load_student

    run, settings = tmp_path / "run", ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", settings, "--main_process_port", 0),
        *("-m", "compact_fast", "train", "--student", tiny_student, "--data", rationales),
        *("--output-dir", run, "--max-steps", 2, "--logging-steps", 1, "--holdout", 0.2),
        *("--learning-rate", 1e-3, "--gradient-accumulation-steps", 1, "--no-lora"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "COMPACT_FAST_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [str(word) for word in command],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    assert child.returncode == 0, said
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished", said
    assert record["config"]["sharding"] == "fsdp"
    measured = json.loads((run / "evaluation.json").read_text())
    before, after = (measured[when]["rationale_nll"] for when in ("before", "after"))
    assert before["nll"] != after["nll"]
    trained, start = (load_student(str(path)).model for path in (run / "model", tiny_student))
    assert type(trained) is type(start)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_sharding_alone_is_refused_before_anything_is_read(tmp_path, capsys) -> None:
    from compact_fast.cli.main import main

    run = tmp_path / "run"
    words = ["train", "--student", "none", "--data", "none", "--output-dir", str(run)]
    assert main([*words, "--sharding", "fsdp"]) == 2
    assert "one process has nobody to share with; start several" in capsys.readouterr().err
    assert not run.exists()
