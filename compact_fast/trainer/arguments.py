"""Training arguments: those of transformers, the method's configuration, the authors' defaults."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from compact_fast.config import CompactConfig
from compact_fast.trainer.launcher import launched_bf16, launched_sharding

# Settings of the host that this trainer's loss or data cannot honour, and the value that is off.
_REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0, "the loss has no label smoothing"),
    "use_liger_kernel": (False, "the loss has kernels of its own; see backend"),
    "torch_compile": (False, "use compile_body"),
    "fp16": (False, "fp16 is not supported; use bf16, or fp32"),
    "fsdp": ("", "use sharding='fsdp'"),
    "deepspeed": (None, "DeepSpeed is not supported"),
    "dataloader_drop_last": (False, "no question is dropped"),
    "train_sampling_strategy": ("random", "questions are drawn in random order, fixed by seed"),
}


@dataclass
class CompactTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` whose defaults are the authors' set-up.

    A batch is `per_device_train_batch_size` whole questions with all their rationales, or as many
    as `max_tokens_per_step` has room for. Evaluation is batched by `eval_batch_tokens`, not by
    `per_device_eval_batch_size`.
    Raises ValueError naming a setting that this trainer cannot honour.
    """

    compact: CompactConfig = field(default_factory=CompactConfig)
    """The method's choices."""

    teachers: list[str] = field(default_factory=list)
    """Names of the teachers; `teacher_ids` of the rows index this list."""

    thinking_ids: list[int] = field(default_factory=list)
    """Token ids that count in full in the adaptability score."""

    backend: str = "auto"
    """Name of the backend of the loss."""

    share_prompts: bool = True
    """Read a question's prompt once for all its rationales, where the student can take it and it
    saves work. Equal but for rounding."""

    fusion: Literal["packed", "per_teacher"] = "packed"
    """All rationales of a batch in one forward pass, or one rationale at a time: gradients by
    teacher, compared in the logs, and the memory of one rationale."""

    sharding: Literal["none", "fsdp"] = "none"
    """Every process holds the whole student, or a part of its weights, gradients and optimizer
    state. The losses are the same."""

    max_tokens_per_step: int | None = None
    """Tokens in one forward pass on one device, as many whole questions as fit, in place of
    per_device_train_batch_size questions. A longer question goes alone."""

    compile_body: bool = False
    """Compile the student's body by torch.compile, as one graph, for training. Rationales are then
    padded to multiples of 128 tokens, as every new shape is compiled anew."""

    eval_batch_tokens: int = 16384
    """Padded tokens in one forward pass of the evaluation."""

    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """A progress bar, one line a log, or nothing; auto: a bar on a terminal, lines elsewhere."""

    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant"
    num_train_epochs: float = 5.0
    max_grad_norm: float = 1.0
    bf16: bool | None = None  # type: ignore[assignment]
    """bf16 autocast; None: where a GPU has it."""
    logging_steps: float = 5
    logging_nan_inf_filter: bool = False
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        for name, (off, why) in _REFUSED.items():
            value = getattr(self, name, off)
            if value != off and value:
                raise ValueError(f"{name}={value!r}: {why}")
        if self.progress not in ("auto", "bar", "lines", "none"):
            raise ValueError(f"progress={self.progress!r}: expected auto, bar, lines or none")
        if self.fusion not in ("packed", "per_teacher"):
            raise ValueError(f"fusion={self.fusion!r}: expected packed or per_teacher")
        if self.max_tokens_per_step is not None and self.max_tokens_per_step < 1:
            raise ValueError(f"max_tokens_per_step={self.max_tokens_per_step}: expected at least 1")
        if self.compile_body and (self.gradient_checkpointing or self.compact.mi == "pvi"):
            what = "mi='pvi'" if self.compact.mi == "pvi" else "gradient_checkpointing"
            raise ValueError(f"compile_body=True: not together with {what}")
        if self.compile_body and self.fusion == "per_teacher":
            raise ValueError("compile_body=True: not together with fusion='per_teacher'")
        if launched_sharding():
            self.sharding = "fsdp"
        self._check_sharding()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True: every column of the rows is used")
        if not self.teachers:
            raise ValueError("teachers=[]: name the teachers that the rows' teacher_ids index")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            # Unless told so, the host takes processes without a GPU for runs of their own.
            self.use_cpu = True
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # a language model's loss uses all of them
        gpu = torch.cuda.is_available() and not self.use_cpu
        self.bf16 = launched_bf16(self.bf16)
        if self.bf16 is None:
            self.bf16 = gpu and torch.cuda.is_bf16_supported()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # the host refuses bf16 unless told that the CPU is meant
        if not gpu:
            self.dataloader_pin_memory = False  # it would warn at every start
        # The older name of the same setting warns in newer versions of transformers.
        if getattr(self, "activation_checkpointing", False) is None and self.gradient_checkpointing:
            self.activation_checkpointing = True
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_nll"
            self.greater_is_better = False
        self._check_trackers()
        super().__post_init__()  # type: ignore[no-untyped-call]

    def _check_sharding(self) -> None:
        if self.sharding not in ("none", "fsdp"):
            raise ValueError(f"sharding={self.sharding!r}: expected none or fsdp")
        if self.sharding == "none":
            return
        if self.fusion == "per_teacher":
            raise ValueError(
                "sharding='fsdp': not together with fusion='per_teacher', whose gradients are kept "
                "whole on every process; use fusion='packed'"
            )
        if self.compile_body:
            raise ValueError("sharding='fsdp': not together with compile_body=True")
        checkpointing: Any = self.gradient_checkpointing_kwargs or {}
        if self.gradient_checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                "sharding='fsdp' needs gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _check_trackers(self) -> None:
        from transformers.integrations import integration_utils

        wanted = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        available: Any = integration_utils.get_available_reporting_integrations
        known = available()
        for name in wanted:
            if name not in (*known, "all", "none"):
                raise ValueError(
                    f"report_to={name!r}: unknown, or its package is not installed; there is "
                    f"{', '.join(known) or 'none'}"
                )

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {**values, "compact": asdict(self.compact)}
