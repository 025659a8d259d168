"""Training on transformers' Trainer. Names are imported when first used: transformers is slow."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "CompactTrainer": "trainer",
    "CompactTrainingArguments": "arguments",
    "NonFiniteError": "guard",
    "TrainingInterrupted": "interrupts",
}
__all__ = ["CompactTrainer", "CompactTrainingArguments", "NonFiniteError", "TrainingInterrupted"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"compact_fast.trainer.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
