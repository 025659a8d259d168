"""How many steps a run with a budget of tokens has: as forecast, on any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import in_processes
from toy import make_rows, make_student, make_trainer

from compact_fast.flat_yaml import Setting
from compact_fast.pipeline.forecast import budgeted, count_steps
from compact_fast.run_config import build
from compact_fast.trainer.batching import question_lengths

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("count", "budget"), [(23, 60), (7, 1)])
def test_the_forecast_is_what_the_trainer_does(
    tmp_path: Path, count: int, budget: int, processes: int
) -> None:
    """The last budget is below any question: each goes alone."""
    keys = {"max_tokens_per_step": budget, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    config = build({k: Setting(v, f"--{k}") for k, v in keys.items()})
    rows = make_rows(count)
    passes = budgeted(config, make_student(), question_lengths(rows))

    def work(rank: int) -> Any:
        trainer = make_trainer(tmp_path / "run", make_student(), rows, use_cpu=False, **keys)
        trainer.train()
        seen = trainer.state
        return seen.global_step, seen.max_steps, seen.epoch

    found = in_processes(tmp_path / "run", processes, work) if processes > 1 else [work(0)]
    steps, epochs = count_steps(config, count, processes, passes)
    assert found == [(steps, steps, epochs)] * processes
