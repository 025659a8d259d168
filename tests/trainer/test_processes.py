"""Several processes on one machine (gloo) train as one does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import in_processes
from toy import make_rows, make_student, make_trainer
from transformers import TrainerCallback

from compact_fast.config import CompactConfig
from compact_fast.trainer import NonFiniteError

SETTINGS: dict[str, Any] = {
    "config": CompactConfig(filter_below=0.0),
    "optim": "sgd",
    "learning_rate": 0.5,
    "logging_steps": 2,
    "eval_rows": make_rows(5, seed=9),
    "eval_strategy": "epoch",
    "num_train_epochs": 2,
}


class _Death(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _train(
    folder: Path,
    *,
    lora: bool = False,
    poison: bool = False,
    die: bool = False,
    count: int = 16,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    model = make_student(lora=lora).to(dtype)
    if poison:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 1:  # one process alone meets the bad number
            weight = model.model.layers[0].mlp.up_proj
            weight.register_forward_hook(lambda m, a, out: out * torch.nan if m.training else out)
    trainer = make_trainer(
        folder,
        model,
        make_rows(count),
        use_cpu=False,  # as a user would, who has no GPU and says nothing
        **{**SETTINGS, **changes},
    )
    if die and trainer.args.process_index == 1:
        trainer.add_callback(_Death())
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def processes(folder: Path, world: int, **settings: Any) -> list[Any]:
    """What each of `world` processes came to: weights, or an error as text."""
    return in_processes(folder, world, lambda rank: _train(folder, **settings))


def rows(folder: Path) -> list[dict[str, Any]]:
    timed = ("time", "per_second", "wait")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not any(word in k for word in timed)}
        for line in lines
    ]


pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")


def assert_equal_runs(one: Path, other: Path, rel: float) -> None:
    alone, together = rows(one), rows(other)
    assert [set(row) for row in alone] == [set(row) for row in together]
    for a, b in zip(alone, together, strict=True):
        for key in a.keys() - {"epoch"}:  # the host's counts passes
            loose = 10 if "mi" in key or "entropy" in key else 1
            assert a[key] == pytest.approx(b[key], rel=loose * rel, abs=1e-6), key


@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_train_as_one(tmp_path: Path, lora: bool) -> None:
    """Uneven K and lengths: an average of ranks in place of one over questions would show."""
    one = _train(tmp_path / "one", lora=lora, per_device_train_batch_size=4)
    first, second = processes(tmp_path / "two", 2, lora=lora, per_device_train_batch_size=2)
    assert isinstance(first, dict), first
    for name in one:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(one[name], first[name], rtol=1e-4, atol=1e-6)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 1e-4)


# Of one process; every other number of processes makes the same steps in fewer passes, or with
# fewer questions in each.
EVENLY = {
    "questions": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, 15),
    "budget": ({"max_tokens_per_step": 60, "gradient_accumulation_steps": 4}, 15),
    "few": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, 5),
}


@pytest.mark.parametrize("case", EVENLY)
def test_one_two_and_four_processes_make_the_same_losses(tmp_path: Path, case: str) -> None:
    """The last step has too few questions for all, so that some processes are idle in it."""
    settings, count = EVENLY[case]
    small: dict[str, Any] = {"count": count, "learning_rate": 0.05, "logging_steps": 1}
    _train(tmp_path / "1", **small, **settings)
    shared = "gradient_accumulation_steps" if case == "budget" else "per_device_train_batch_size"
    for world in (2, 4):
        mine = {**settings, shared: 4 // world}
        found = processes(tmp_path / str(world), world, **small, **mine)
        assert all(isinstance(weights, dict) for weights in found), found
        losses = [
            [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
            for name in ("1", str(world))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), world
        assert_equal_runs(tmp_path / "1", tmp_path / str(world), 1e-5)


def test_all_processes_stop_when_one_meets_a_non_finite_number(tmp_path: Path) -> None:
    outcomes = processes(tmp_path / "two", 2, per_device_train_batch_size=2, poison=True)
    for outcome in outcomes:
        assert isinstance(outcome, str)
        assert outcome.startswith(f"{NonFiniteError.__name__}: step 1: "), outcome


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    first, second = processes(tmp_path / "two", 2, per_device_train_batch_size=2, die=True)
    assert second is None
    assert first.startswith("RuntimeError: process 0 of 2: another process has ended"), first
    status = json.loads((tmp_path / "two" / "run.json").read_text())["status"]
    assert "another process has ended" in status
