"""The same seed, the same bits, interrupted or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    BLEND,
    make_rows,
    make_student,
    make_trainer,
    metrics,
    same,
    trained,
    untimed,
)
from transformers import TrainerCallback

from compact_fast.config import CompactConfig


def stochastic(lora: bool = False) -> Any:
    return make_student(attention_dropout=0.3, lora=lora)


@pytest.mark.parametrize(
    "config", [BLEND, CompactConfig(weighting="random")], ids=["blend", "random"]
)
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, config: CompactConfig) -> None:
    first = trained(make_trainer(tmp_path / "a", stochastic(), config=config))
    second = trained(make_trainer(tmp_path / "b", stochastic(), config=config))
    assert same(first, second)
    rows = [[untimed(r) for r in metrics(tmp_path / x)] for x in "ab"]
    assert rows[0] == rows[1]
    other = trained(make_trainer(tmp_path / "c", stochastic(), config=config, seed=7))
    assert not same(first, other)


def test_what_runs_before_training_does_not_matter(tmp_path: Path) -> None:
    first = trained(make_trainer(tmp_path / "a", stochastic()))
    trainer = make_trainer(tmp_path / "b", stochastic())
    torch.rand(100)
    assert same(first, trained(trainer))


@pytest.mark.parametrize(
    ("lora", "reading"),
    [
        (False, {}),
        (True, {}),
        (False, {"max_tokens_per_step": 45}),
        (False, {"max_tokens_per_step": 45, "dataloader_num_workers": 2}),
    ],
    ids=["full", "lora", "budget", "workers"],
)
def test_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, lora: bool, reading: dict[str, Any]
) -> None:
    """Stopped at step 4, in the second epoch and inside a logging window of 3 steps."""
    settings: dict[str, Any] = {
        **reading,
        "config": BLEND,
        "eval_rows": make_rows(3, seed=9),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_train_epochs": 4,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "lr_scheduler_type": "cosine",
    }

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = make_trainer(tmp_path / "a", stochastic(lora), **settings)
    expected = trained(whole)
    first = make_trainer(tmp_path / "b", stochastic(lora), **settings)
    first.add_callback(StopAt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["status"] == "stopped: KeyboardInterrupt"
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:  # as a kill may leave it
        file.write('{"step": 5, "time": 1.0, "loss": 3.0}\n{"step": 6, "ti')

    second = make_trainer(tmp_path / "b", stochastic(lora), **settings)
    assert same(expected, trained(second, resume_from_checkpoint="auto"))
    rows = [[untimed(r) for r in metrics(tmp_path / x)] for x in "ab"]
    assert rows[0] == rows[1]
    times = [row["time"] for row in metrics(tmp_path / "b")]
    assert times == sorted(times)
    # The closing summary's mean loss is of the steps of one process.
    histories = [t.state.log_history[:-1] for t in (whole, second)]
    assert histories[0] == histories[1]
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["status"] == "finished"
    assert [r["step"] for r in run["resumed"]] == [4]
