"""Runs of the real trainer that are killed, stopped or poisoned end as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import make_trainer

import compact_fast.trainer.step as step_module
from compact_fast.trainer import NonFiniteError
from compact_fast.trainer.checkpoints import list_checkpoints, verify_checkpoint


def survive(*arguments: object) -> dict[str, Any]:
    script = Path(__file__).with_name("survival.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_twenty_kills_end_with_the_bits_of_the_uninterrupted_run(tmp_path: Path) -> None:
    summary = survive("kills", tmp_path, 20)
    print(summary)
    assert summary["wrong"] == []
    assert summary["kills"] == sum(summary["where"].values()) == 20
    assert summary["where"]["inside a save"] >= 3


def test_kills_of_a_run_with_a_budget_of_tokens(tmp_path: Path) -> None:
    """Passes of 1 to 4 questions, four steps an epoch, the last one short."""
    summary = survive("kills", tmp_path, 5, 50)
    print(summary)
    assert summary["wrong"] == []
    assert summary["kills"] == 5
    assert summary["steps"] == 16


def test_two_processes_save_stop_and_fail_together(tmp_path: Path) -> None:
    seen = survive("ranks", tmp_path)
    first, second = seen["whole"]
    assert first == second
    assert {"rng_state_0.pth", "rng_state_1.pth", "log_window_1.json"} < set(first)
    # SIGTERM reached one of the two.
    assert seen["interrupted"][0] == seen["interrupted"][1]
    assert "SIGTERM after step 5; checkpoint-5 is whole" in seen["interrupted"][0]
    for name in ("model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert seen["resumed"][0][name] == first[name]
    # A write that fails on the second process fails the checkpoint on both.
    assert ["Input/output error" in message for message in seen["failing"]] == [True, True]
    assert seen["left"] == ["checkpoint-2", "metrics.jsonl", "run.json"]
    assert ["extra: not in the manifest" in message for message in seen["damaged"]] == [True, True]


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
def test_second_signal_stops_at_once(tmp_path: Path, signum: str) -> None:
    script = f"""
import os, signal, time
from compact_fast.trainer.interrupts import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.{signum})
    assert signals.received == signal.{signum}
    print("going on", flush=True)
    os.kill(os.getpid(), signal.{signum})
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode in (-15, -2)
    assert done.stdout == "going on\n"
    assert f"{signum}: finishing this step and saving; once more stops at once" in done.stderr


def test_one_nan_stops_the_run_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 1,
    }
    make_trainer(tmp_path / "whole", **settings).train()

    trainer = make_trainer(tmp_path / "run", **settings)
    original = step_module.compact_loss

    def poisoned(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 6:
            hidden = hidden * torch.nan
        return original(hidden, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "compact_loss", poisoned)
        with pytest.raises(NonFiniteError, match=r"step 7: .*question 'q\d+', teacher") as caught:
            trainer.train()
    assert caught.value.step == 7
    assert isinstance(caught.value, ValueError)  # which the command turns into exit code 2
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert list(list_checkpoints(tmp_path / "run")) == [2, 4, 6]
    for path in list_checkpoints(tmp_path / "run").values():
        verify_checkpoint(path)
        weights = load_file(path / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    assert "stopped" in json.loads((tmp_path / "run" / "run.json").read_text())["status"]

    # The cause removed, the run goes on as if it had never been there.
    make_trainer(tmp_path / "run", **settings).train("auto")
    for name in ("model.safetensors", "optimizer.pt"):
        last = "checkpoint-18/" + name
        assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
