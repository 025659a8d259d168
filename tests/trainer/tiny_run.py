"""A run of a second or less for the reliability tests: a Llama of width 16 on random tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from compact_fast.trainer.checkpoints import CheckpointedTrainer

# Rows that hold wall-clock figures differ from run to run.
TIMED = ("runtime", "per_second", "time", "started", "finished")


def make_model() -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.2,  # so that the random state matters
    )
    return LlamaForCausalLM(config)


def make_rows(count: int = 22, length: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(output_dir: Path, **changes: Any) -> CheckpointedTrainer:
    """22 rows, 4 a step in 2 halves: 6 steps an epoch, the last one short; 24 steps in all.

    Saves at 2, 4, ... and logs at 3, 6, ..., so that checkpoints fall between log rows.
    """
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 3,
        "logging_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return CheckpointedTrainer(
        model=make_model(),
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=make_rows(),
        eval_dataset=make_rows(4),
    )


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not any(word in k for word in TIMED)}


def fingerprint(run_dir: Path, step: int = 24) -> dict[str, Any]:
    """All that must be equal, bit for bit, at the end of two runs that count as the same."""
    folder = run_dir / f"checkpoint-{step}"
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [_untimed(row) for row in state["log_history"]]
    state["best_model_checkpoint"] = os.path.basename(state["best_model_checkpoint"] or "")
    files = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    return {
        "state": state,
        "names": sorted(path.name for path in folder.iterdir()),
        "checkpoints": sorted(path.name for path in run_dir.glob("checkpoint-*")),
        **{name: (folder / name).read_bytes().hex() for name in files},
    }
