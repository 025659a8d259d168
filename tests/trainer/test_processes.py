"""Two processes on one machine (gloo) train as one does."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import make_rows, make_student, make_trainer

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


def _train(
    folder: Path, *, lora: bool, questions: int, poison: bool = False, **changes: Any
) -> Any:
    model = make_student(lora=lora)
    if poison:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 1:  # one process alone meets the bad number
            weight = model.model.layers[0].mlp.up_proj
            weight.register_forward_hook(lambda m, a, out: out * torch.nan if m.training else out)
    trainer = make_trainer(
        folder,
        model,
        make_rows(16),
        per_device_train_batch_size=questions,
        use_cpu=False,  # as a user would, who has no GPU and says nothing
        **{**SETTINGS, **changes},
    )
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def _child(rank: int, port: int, folder: Path, settings: dict[str, Any]) -> None:
    from accelerate.state import AcceleratorState

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        outcome: Any = _train(folder, **settings)
    except Exception as error:
        traceback.print_exc()
        outcome = f"{type(error).__name__}: {error}"
    torch.save(outcome, folder.with_name(f"{folder.name}-rank{rank}.pt"))
    os._exit(0)  # forked: nothing of the parent's is ours to clean up


def two_processes(folder: Path, **settings: Any) -> list[Any]:
    """What each of two processes came to: weights, or an error as text."""
    torch.set_num_threads(1)  # a fork has no use for threads it does not inherit
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_child, args=(r, port, folder, settings)) for r in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
            pytest.fail("a process hangs")
    return [torch.load(folder.with_name(f"{folder.name}-rank{rank}.pt")) for rank in range(2)]


def rows(folder: Path) -> list[dict[str, Any]]:
    timed = ("time", "per_second")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not any(word in k for word in timed)}
        for line in lines
    ]


pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")


@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_train_as_one(tmp_path: Path, lora: bool) -> None:
    """Uneven K and lengths: an average of ranks in place of one over questions would show."""
    one = _train(tmp_path / "one", lora=lora, questions=4)
    first, second = two_processes(tmp_path / "two", lora=lora, questions=2)
    assert isinstance(first, dict), first
    for name in one:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(one[name], first[name], rtol=1e-4, atol=1e-6)
    alone, together = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [set(row) for row in alone] == [set(row) for row in together]
    for a, b in zip(alone, together, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_all_processes_stop_when_one_meets_a_non_finite_number(tmp_path: Path) -> None:
    outcomes = two_processes(tmp_path / "two", lora=False, questions=2, poison=True)
    for outcome in outcomes:
        assert isinstance(outcome, str)
        assert outcome.startswith(f"{NonFiniteError.__name__}: step 1: "), outcome
