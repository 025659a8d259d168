"""What a run would take, before it runs: steps, tokens, memory. Estimates, and labelled so."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compact_fast.backends import Choice, choose
from compact_fast.backends.torch_backend import CHUNK_BYTES
from compact_fast.run_config import RunConfig
from compact_fast.students import body_and_head, causal_model
from compact_fast.trainer.batching import (
    Ints,
    QuestionBatches,
    question_lengths,
    sequence_tokens,
)
from compact_fast.trainer.fusion import gradient_bytes
from compact_fast.trainer.packing import Packing, choose_packing, mask_wanted
from compact_fast.trainer.step import run_spec

# Logits the torch backend holds at once, and what it makes of them (bench/loss_memory.py).
LOSS_CHUNK_BYTES = 3 * CHUNK_BYTES
_TRIAL_TOKENS = 32


@dataclass(frozen=True)
class Memory:
    """Peak bytes on the training device, by what they hold. Estimates."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    process: int
    """Python and its libraries, where training shares their memory (on the CPU)."""

    @property
    def peak_bytes(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    steps: int
    questions_per_update: int
    epochs: float
    tokens: int
    """Tokens read over the whole run, without padding."""

    packed: Memory
    per_teacher: Memory
    fusion: Literal["packed", "per_teacher"]
    """As configured; "auto": packed unless only per_teacher fits `available`."""

    available: int
    """Bytes that the training device has in all."""

    @property
    def chosen(self) -> Memory:
        """The memory of the fusion that will run."""
        return self.packed if self.fusion == "packed" else self.per_teacher


def forecast(config: RunConfig, model: Any, rows: Sequence[Mapping[str, Any]]) -> Forecast:
    """Steps and tokens exactly; memory from what the student keeps of a few tokens' forward pass.

    Activations are those of the largest batch that can occur: the `questions_per_step` questions
    with the most positions, or, one rationale at a time, the longest rationale.
    """
    t = config.training
    rows = trainable_rows(config, rows)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lengths = question_lengths(rows)
    steps, epochs = count_steps(config, len(rows), processes, budgeted(config, model, lengths))
    per_update = t.questions_per_step * t.gradient_accumulation_steps * processes
    if t.max_tokens_per_step is not None:
        per_update = round(len(rows) * epochs / steps)  # on average
    packed, per_teacher = memory(config, model, lengths)
    available = device_memory()
    fusion: Literal["packed", "per_teacher"]
    if t.fusion == "auto":
        fits = can_be_apart(config) and packed.peak_bytes > available >= per_teacher.peak_bytes
        fusion = "per_teacher" if fits else "packed"
    else:
        fusion = t.fusion
    return Forecast(
        steps=steps,
        questions_per_update=per_update,
        epochs=epochs,
        tokens=round(int(sequence_tokens(*lengths).sum()) * epochs),
        packed=packed,
        per_teacher=per_teacher,
        fusion=fusion,
        available=available,
    )


def memory(
    config: RunConfig, model: Any, lengths: tuple[Ints, Ints, Ints, Ints]
) -> tuple[Memory, Memory]:
    """Peaks of training all rationales at once, and one at a time.

    `lengths` are those of `question_lengths`.
    """
    t, head = config.training, body_and_head(model)
    vocabulary, width = head.weight.shape
    taken = -np.sort(-packing_of(config, model).positions(*lengths))
    if t.max_tokens_per_step is None:
        largest = int(taken[: t.questions_per_step].sum())
    else:
        largest = max(int(taken[0]), min(t.max_tokens_per_step, int(taken.sum())))
    prompts, _, completions, counts = lengths
    longest, teachers = int((prompts + completions).max()), int(counts.max())
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
    head_gradient = width * vocabulary * 4 if head.trainable else 0
    on_cpu = not torch.cuda.is_available()
    token_bytes = activation_bytes_per_token(config, model)

    def of(tokens: int, labels: int, gradients: int) -> Memory:
        return Memory(
            weights=weight_bytes,
            gradients=gradients,
            optimizer=2 * trained_bytes,
            activations=tokens * token_bytes,
            loss=loss_bytes(labels, vocabulary, width) + head_gradient,
            process=max(resident_bytes() - weight_bytes, 0) if on_cpu else 0,
        )

    apart = trained_bytes + (teachers + 1) * gradient_bytes(model) if trained else 0
    return of(largest, largest, trained_bytes), of(longest, longest, apart)


def can_be_apart(config: RunConfig) -> bool:
    """Whether fusion="per_teacher" takes this method."""
    return config.method.mode != "reference" and config.method.consistency != "all"


def device_memory() -> int:
    """Bytes of the GPU, or of the machine or container; a very large number where unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's share, or "max"
    with contextlib.suppress(OSError, ValueError):
        found.append(int(limit.read_text()))
    return min(found)


def trainable_rows(
    config: RunConfig, rows: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The rows that training will use; weighting="correct" leaves out those with none right."""
    if config.method.weighting != "correct":
        return rows
    return [row for row in rows if 1 in row["correct"]]


def packing_of(config: RunConfig, model: Any) -> Packing:
    """How training will pack rationales."""
    return choose_packing(
        model,
        share=config.training.share_prompts,
        keep_padding=config.method.mode == "reference",
        masked=mask_wanted(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    )


def budgeted(config: RunConfig, model: Any, lengths: tuple[Ints, Ints, Ints, Ints]) -> int | None:
    """Forward passes of an epoch under max_tokens_per_step; None without it.

    `lengths` are those of `question_lengths`.
    """
    if config.training.max_tokens_per_step is None:
        return None
    sizes, padded = packing_of(config, model).sizes(*lengths)
    return len(QuestionBatches(sizes, rows=padded, budget=config.training.max_tokens_per_step))


def count_steps(
    config: RunConfig, questions: int, processes: int = 1, passes: int | None = None
) -> tuple[int, float]:
    """Optimizer steps of the run, and how many times it passes over the questions.

    `passes`: forward passes of an epoch, where they are not of `questions_per_step` each.
    """
    t = config.training
    passes = math.ceil(questions / t.questions_per_step) if passes is None else passes
    batches = math.ceil(passes / processes)
    per_epoch = max(math.ceil(batches / t.gradient_accumulation_steps), 1)
    if t.max_steps > 0:
        return t.max_steps, t.max_steps / per_epoch
    return math.ceil(t.num_train_epochs * per_epoch), t.num_train_epochs


def loss_bytes(labels: int, vocabulary: int, width: int) -> int:
    """Chunks of logits, and the gradients of the hidden states they come from."""
    logits = min(LOSS_CHUNK_BYTES, 3 * labels * vocabulary * 4)
    return logits + 2 * labels * width * 4


def activation_bytes_per_token(config: RunConfig, model: Any) -> int:
    """Bytes kept for the backward pass, a token, as a forward pass of a few tokens keeps them.

    With recomputation a layer keeps its input alone, and one layer at a time the rest.
    """
    kept = kept_bytes(model, _TRIAL_TOKENS, autocast=bf16_autocast(config)) // _TRIAL_TOKENS
    if not config.training.gradient_checkpointing:
        return kept
    shape = causal_model(model).config.get_text_config()
    size = 2 if bf16_autocast(config) else next(model.parameters()).element_size()
    return int(shape.num_hidden_layers * shape.hidden_size * size) + kept // int(
        shape.num_hidden_layers
    )


def kept_bytes(model: Any, tokens: int, *, autocast: bool = False) -> int:
    """Bytes that one training pass of the body keeps for its backward pass, weights left out.

    Dropout is on, as in training; random numbers and the model's mode are put back.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by address; held, so that none is used twice

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    parts = body_and_head(model)
    device, vocabulary = parts.weight.device, parts.weight.shape[0]
    ids = (torch.arange(tokens, device=device) % vocabulary)[None]
    before = [module for module in model.modules() if not module.training]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    model.train()
    try:
        with (
            torch.random.fork_rng(),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        ):
            parts.body(ids)
    finally:
        for module in before:
            module.training = False
        for module in checkpointed:
            module.gradient_checkpointing = True
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def resident_bytes() -> int:
    """Memory of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def bf16_autocast(config: RunConfig) -> bool:
    """Whether training will run under bf16 autocast."""
    if config.training.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.training.bf16


def backend_choice(config: RunConfig, model: Any) -> Choice:
    """The backend the loss would run on, with the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose(config.training.backend, run_spec(model, device))
