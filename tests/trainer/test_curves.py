"""A training run does not depend on the backend that computes its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import make_trainer
from transformers import TrainerCallback

from compact_fast.config import CompactConfig

STEPS = 200


class Losses(TrainerCallback):
    """Every logged loss, unrounded."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


@pytest.mark.nightly
def test_reference_and_torch_give_one_curve(tmp_path: Path) -> None:
    curves = []
    for backend in ("reference", "torch"):
        trainer = make_trainer(
            tmp_path / backend,
            config=CompactConfig(filter_below=0.0),
            backend=backend,
            max_steps=STEPS,
            logging_steps=1,
            learning_rate=1e-4,
        )
        losses = Losses()
        trainer.add_callback(losses)
        trainer.train()
        curves.append(torch.tensor(losses.values, dtype=torch.float64))
    a, b = curves
    assert len(a) == len(b) == STEPS
    assert a[-10:].mean() < a[:10].mean()
    difference = (a - b).abs()
    assert difference.max() <= 1e-6, difference.max()
    # losses are float32, 2.4e-7 apart here: nearly all steps give the same one
    assert difference.mean() <= 1e-8, difference.mean()
