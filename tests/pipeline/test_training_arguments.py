"""What a user writes reaches the trainer."""

from __future__ import annotations

from dataclasses import fields

import pytest

from compact_fast.flat_yaml import Setting
from compact_fast.pipeline.training import training_arguments
from compact_fast.run_config import TrainingSettings, build

# Keys that the trainer knows by another name, and those that the pipeline reads itself
RENAMED = {"questions_per_step": "per_device_train_batch_size"}
NOT_THE_TRAINERS = {"consensus_backend", "consensus_threads"}
# A value other than the default for each of the others
OTHER = {
    "questions_per_step": 3,
    "max_tokens_per_step": 999,
    "gradient_accumulation_steps": 7,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 1.5,
    "max_steps": 11,
    "max_grad_norm": 0.5,
    "bf16": False,
    "gradient_checkpointing": True,
    "compile_body": True,
    "share_prompts": False,
    "fusion": "per_teacher",
    "sharding": "fsdp",
    "backend": "torch",
    "logging_steps": 9,
    "eval_steps": 13,
    "save_steps": 17,
    "save_total_limit": 4,
    "report_to": "tensorboard",
    "progress": "none",
}


def arguments(tmp_path, **keys):
    values = {"output_dir": str(tmp_path), **keys}
    config = build({k: Setting(v, f"--{k}") for k, v in values.items()})
    return training_arguments(config, teachers=["a"], thinking_ids=[])


@pytest.mark.parametrize("name", [f.name for f in fields(TrainingSettings)])
def test_every_key_reaches_the_trainer(name, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    trackers = "get_available_reporting_integrations"
    monkeypatch.setattr(integration_utils, trackers, lambda: ["tensorboard"])
    if name in NOT_THE_TRAINERS:
        assert not hasattr(arguments(tmp_path), name)
        return
    value = OTHER[name]
    found = getattr(arguments(tmp_path, **{name: value}), RENAMED.get(name, name))
    assert getattr(found, "value", found) in (value, [value])
    default = getattr(arguments(tmp_path), RENAMED.get(name, name))
    assert getattr(default, "value", default) != value or name == "bf16"  # auto is off here


@pytest.mark.parametrize("other", [{"gradient_checkpointing": True}, {"fusion": "per_teacher"}])
def test_a_compiled_body_takes_neither_recomputation_nor_one_teacher_at_a_time(other, tmp_path):
    with pytest.raises(ValueError, match="compile_body=True: not together with"):
        arguments(tmp_path, compile_body=True, **other)
